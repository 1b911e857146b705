// Judge says of objects what GitOps tools would say of them.
//
//	judge kstatus          the verdict of kstatus, which Flux and `kpt live` wait for
//	judge lua health.lua   the health that Argo CD takes from this check
//
// An object a line as JSON on stdin; its verdict a line as JSON on stdout: {"status": …, "message": …}.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

const longestObject = 4 << 20 // bytes; etcd takes less

// Verdict is what a tool says of an object.
type Verdict struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

type judge func(*unstructured.Unstructured) (Verdict, error)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "judge:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	judged, err := chosen(arguments)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, longestObject)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(lines.Bytes()); err != nil {
			return err
		}
		verdict, err := judged(object)
		if err != nil {
			return fmt.Errorf("%s %s: %w", object.GetKind(), object.GetName(), err)
		}
		if err := out.Encode(verdict); err != nil {
			return err
		}
	}
	return lines.Err()
}

func chosen(arguments []string) (judge, error) {
	switch {
	case len(arguments) == 1 && arguments[0] == "kstatus":
		return byKstatus, nil
	case len(arguments) == 2 && arguments[0] == "lua":
		script, err := os.ReadFile(arguments[1])
		return func(object *unstructured.Unstructured) (Verdict, error) { return byLua(object, string(script)) }, err
	}
	return nil, fmt.Errorf("say kstatus, or lua and the file of a health check")
}

func byKstatus(object *unstructured.Unstructured) (Verdict, error) {
	result, err := status.Compute(object)
	if err != nil {
		return Verdict{}, err
	}
	return Verdict{Status: result.Status.String(), Message: result.Message}, nil
}
