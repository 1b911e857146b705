//go:build tools

// Package krew pins krew, which the tests install the kubectl plugin with.
package krew

import (
	_ "sigs.k8s.io/krew/cmd/krew"
)
