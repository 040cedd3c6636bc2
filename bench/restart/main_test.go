package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"regexp"
	"runtime"
	"testing"
	"time"
)

func TestBadFlags(t *testing.T) {
	for _, args := range [][]string{{"-log", "-1"}, {"-entries", "-1"}, {"-size", "0"}, {"-rounds", "0"}, {"extra"}, {"-guess"}} {
		if err := run(context.Background(), args, io.Discard, io.Discard); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}

// Both measurements run, on little data, and leave neither goroutine nor file.
func TestRestarts(t *testing.T) {
	before, dir := runtime.NumGoroutine(), t.TempDir()
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-log", "4", "-entries", "500", "-rounds", "2", "-dir", dir}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`a log of \d+ MiB, \d{4,} entries of 128 bytes`, `Start: \d`, `until everything is applied: \d`, `missed 500 entries of 128 bytes: Start \d`,
	} {
		if !regexp.MustCompile(want).Match(out.Bytes()) {
			t.Errorf("it does not print %s:\n%s", want, &out)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
		runtime.Gosched()
	}
}
