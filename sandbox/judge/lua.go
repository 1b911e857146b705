package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	luajson "layeh.com/gopher-json"
)

// What a health check may answer (gitops-engine pkg/health).
var healths = []string{"Healthy", "Progressing", "Degraded", "Suspended", "Missing", "Unknown"}

// byLua runs a health check as Argo CD does (util/lua/lua.go): the same interpreter, for at most a second, the object
// as the global obj, and of the standard libraries only those that a check in argocd-cm gets by default.
func byLua(object *unstructured.Unstructured, script string) (Verdict, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable} {
		state.Push(state.NewFunction(open))
		state.Push(lua.LString(name))
		state.Call(1, 0)
	}
	limit, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	state.SetContext(limit)
	state.SetGlobal("obj", luaValue(state, object.Object))
	if err := state.DoString(script); err != nil {
		return Verdict{}, err
	}
	answer := state.Get(-1)
	if answer.Type() != lua.LTTable {
		return Verdict{}, fmt.Errorf("the check returns a %s, not a table", answer.Type())
	}
	text, err := luajson.Encode(answer)
	if err != nil {
		return Verdict{}, err
	}
	var verdict Verdict
	if err := json.Unmarshal(text, &verdict); err != nil {
		return Verdict{}, err
	}
	if !slices.Contains(healths, verdict.Status) {
		return Verdict{}, fmt.Errorf("%q is no health", verdict.Status)
	}
	return verdict, nil
}

func luaValue(state *lua.LState, value any) lua.LValue {
	switch known := value.(type) {
	case bool:
		return lua.LBool(known)
	case string:
		return lua.LString(known)
	case int64:
		return lua.LNumber(known)
	case float64:
		return lua.LNumber(known)
	case []any:
		list := state.NewTable()
		for _, item := range known {
			list.Append(luaValue(state, item))
		}
		return list
	case map[string]any:
		table := state.NewTable()
		for key, item := range known {
			table.RawSetString(key, luaValue(state, item))
		}
		return table
	}
	return lua.LNil
}
