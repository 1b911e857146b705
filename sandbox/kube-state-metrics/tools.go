//go:build tools

// Package tools pins kube-state-metrics, which the tests give our configuration to.
package tools

import (
	_ "k8s.io/kube-state-metrics/v2"
)
