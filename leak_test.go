package raft

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime/pprof"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
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

// lookFor bounds how long leaktest waits for goroutines to end. It does what
// leaktest.CheckTimeout does, without a timer: on a loaded machine leaktest saw
// the goroutine of its own timer, just as that began to end the wait, and took
// it for a leak.
func lookFor(d time.Duration) context.Context {
	return &lookBound{Context: context.Background(), bound: d}
}

type lookBound struct {
	context.Context
	bound time.Duration
	began time.Time // of the first look
	looks int
}

// Done is asked before each look. A second one is always granted: a machine
// that stands still after the first has shown nothing.
func (b *lookBound) Done() <-chan struct{} {
	if b.looks++; b.looks == 1 {
		b.began = time.Now()
	}
	if b.looks <= 2 || time.Since(b.began) < b.bound {
		return nil
	}
	over := make(chan struct{})
	close(over)
	return over
}

// accusations are what leaktest complains of.
type accusations []string

func (a *accusations) Errorf(format string, args ...any) {
	*a = append(*a, fmt.Sprintf(format, args...))
}

func TestLookFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got accusations
		check := leaktest.CheckContext(lookFor(100*time.Millisecond), &got)
		began, stop := time.Now(), make(chan struct{})
		go func() { <-stop }()
		time.Sleep(time.Hour) // the bound is one of the look, not of the test
		check()
		if took := time.Since(began) - time.Hour; took != 100*time.Millisecond {
			t.Errorf("leaktest looked for %v", took)
		}
		close(stop)
		if len(got) != 2 || !strings.Contains(got[1], "TestLookFor") {
			t.Errorf("leaktest said %q; want that time is over, and the one goroutine that is left", got)
		}
		got = nil
		check = leaktest.CheckContext(lookFor(100*time.Millisecond), &got)
		go func() { time.Sleep(75 * time.Millisecond) }()
		synctest.Wait()             // leaktest does not see one that has not begun
		if check(); len(got) != 2 { // looks are 50 ms apart: this one is seen twice, and never gone
			t.Errorf("of a goroutine that ended too late leaktest said %q", got)
		}
		got = nil
		check = leaktest.CheckContext(lookFor(100*time.Millisecond), &got)
		go func() { time.Sleep(25 * time.Millisecond) }()
		synctest.Wait()
		if check(); len(got) != 0 {
			t.Errorf("of a goroutine that ended in time leaktest said %q", got)
		}
		b := lookFor(100 * time.Millisecond)
		for look, over := range []bool{false, false, true} {
			if isClosed(b.Done()) != over {
				t.Errorf("look %d: over %v", look+1, !over)
			}
			time.Sleep(time.Second) // the machine stands still
		}
	})
}
