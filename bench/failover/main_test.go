package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestMain makes the test binary the command where the command starts itself.
func TestMain(m *testing.M) {
	if os.Getenv(childVariable) == "" {
		os.Exit(m.Run())
	}
	if err := run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Both ways work, and leave neither a goroutine nor a file. How long they take
// is not for a test.
func TestShortRun(t *testing.T) {
	before := runtime.NumGoroutine()
	dir, out := t.TempDir(), filepath.Join(t.TempDir(), "out.json")
	var text bytes.Buffer
	if err := run(t.Context(), []string{"-runs", "3", "-dir", dir, "-json", out}, nil, &text, io.Discard); err != nil {
		t.Fatal(err)
	}
	var took map[string][]time.Duration
	b, err := os.ReadFile(out)
	if err == nil {
		err = json.Unmarshal(b, &took)
	}
	if err != nil || len(took[silent]) != 3 || len(took[dead]) != 3 {
		t.Fatalf("JSON has %v (%v), want three runs of each", took, err)
	}
	for _, d := range append(took[silent], took[dead]...) {
		if d <= 0 || d > patience {
			t.Errorf("a run took %v", d)
		}
	}
	if s := text.String(); !strings.Contains(s, "leader silent, 3 runs") || !strings.Contains(s, "leader dead, 3 runs") {
		t.Errorf("printed:\n%s", s)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
	for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
	}
}

// A silent node's connections are open, and neither reading, writing nor closing
// shows the other side that anybody is there.
func TestStall(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newStall()
	listener := stallListener{l, s}
	defer listener.Close()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	far.Write([]byte("a"))
	if _, err := near.Read(b); err != nil || b[0] != 'a' {
		t.Fatalf("before the stall it read %q, %v", b, err)
	}
	ended := make(chan error, 2)
	read := make(chan struct{})
	go func() {
		close(read)
		_, err := near.Read(make([]byte, 1))
		ended <- err
	}()
	<-read
	s.begin()
	go func() {
		_, err := near.Write([]byte("b"))
		ended <- err
	}()
	far.Write([]byte("c")) // arrives at nobody
	near.Close()
	for range 2 {
		if err := <-ended; err == nil {
			t.Error("a silent connection carried something")
		}
	}
	far.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := far.Read(b); n > 0 || err == io.EOF || !err.(net.Error).Timeout() {
		t.Errorf("the other side read %d bytes, %v; want silence", n, err)
	}
	s.end()
	if err := near.Close(); err != nil {
		t.Error(err)
	}
}

func TestReport(t *testing.T) {
	var took []time.Duration
	for i := range 10 {
		took = append(took, time.Duration(i+1)*10*time.Millisecond)
	}
	var w bytes.Buffer
	report(&w, dead, append(took, 300*time.Millisecond))
	for _, want := range []string{"median 60.0 ms, p90 100.0 ms, lowest 10.0 ms, max 300.0 ms", "  300-310 ms # 1"} {
		if !strings.Contains(w.String(), want) {
			t.Errorf("want %q in\n%s", want, w.String())
		}
	}
}

func TestFlagErrorsNameEveryBadFlag(t *testing.T) {
	_, err := parse([]string{"-ways", "silent,slow", "-runs", "0", "extra"}, io.Discard)
	for _, want := range []string{`"slow"`, "-runs", `"extra"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
	}
}
