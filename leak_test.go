package raft

import (
	"bytes"
	"fmt"
	"os"
	"runtime/pprof"
	"testing"
)

// TestMain looks, after all tests, for goroutines that can never run again. It
// needs the runtime's leak profile: GOEXPERIMENT=goroutineleakprofile go test.
func TestMain(m *testing.M) {
	code := m.Run()
	if leaks := pprof.Lookup("goroutineleak"); leaks != nil {
		var b bytes.Buffer
		if err := leaks.WriteTo(&b, 1); err != nil {
			fmt.Fprintln(os.Stderr, "goroutine leak profile:", err)
			code = 1
		}
		if n := leaks.Count(); n > 0 {
			fmt.Fprintf(os.Stderr, "%d goroutines leaked:\n%s", n, b.String())
			code = 1
		} else {
			fmt.Println("goroutine leak profile: nothing leaked")
		}
	}
	os.Exit(code)
}
