package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"example.com/raft"
	"example.com/raft/bench/cluster"
)

func TestFlagErrorsNameEveryBadFlag(t *testing.T) {
	_, err := parse([]string{"-procs", "8,none", "-cases", "loop,guess", "-rounds", "0", "extra"}, io.Discard)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{`-procs: "none"`, `-cases: "guess"`, "-rounds", `unexpected argument "extra"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q:\n%v", want, err)
		}
	}
}

// Every case runs, checks its reads, and leaves no goroutine.
func TestEveryCase(t *testing.T) {
	before := runtime.NumGoroutine()
	out := filepath.Join(t.TempDir(), "out.json")
	var text bytes.Buffer
	err := run(context.Background(), []string{
		"-clients", "8", "-writers", "2", "-rounds", "2", "-time", "150ms", "-warmup", "5ms", "-procs", "3", "-dir", t.TempDir(), "-json", out,
	}, &text, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var samples []sample
	b, err := os.ReadFile(out)
	if err == nil {
		err = json.Unmarshal(b, &samples)
	}
	if err != nil || len(samples) != 2*len(caseNames()) {
		t.Fatalf("%d samples (%v), want two of each case", len(samples), err)
	}
	wrote := 0.0
	for _, s := range samples {
		wrote += s.WritesPerSec
		if s.PerSec <= 0 || s.Procs != 3 || !strings.HasSuffix(s.Case, "writes") && s.WritesPerSec > 0 {
			t.Errorf("sample: %+v", s)
		}
	}
	if wrote == 0 {
		t.Error("nothing was written beside the reads")
	}
	for _, name := range caseNames() {
		if !strings.Contains(text.String(), name+"  ") {
			t.Errorf("%s is not in the table:\n%s", name, text.String())
		}
	}
	noneLeft(t, before)
}

// A read that misses an acknowledged write is an error, not a figure.
func TestStaleReadIsFound(t *testing.T) {
	m := &cluster.Machine{}
	read := checked(func(context.Context) (raft.Index, error) { return 7, nil }, m)
	m.Apply(raft.Entry{Index: 7})
	for floor := raft.Index(6); floor <= 8; floor++ {
		if err := read(t.Context(), floor); (err != nil) != (floor == 8) {
			t.Errorf("entry 7 is applied, and %d was acknowledged: %v", floor, err)
		}
	}
	m.Apply(raft.Entry{Index: 6})
	if err := read(t.Context(), 7); err == nil {
		t.Error("the state machine was not looked at")
	}
}

// noneLeft fails if more goroutines remain than before.
func noneLeft(t *testing.T, before int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
		runtime.Gosched()
	}
}
