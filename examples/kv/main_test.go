package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestCommandLine(t *testing.T) {
	const peers = "a=127.0.0.1:1,b=127.0.0.1:2"
	for _, c := range []struct{ args, want string }{
		{"-h", ""},
		{"-x", "not defined"},
		{"-dir", "needs an argument"},
		{"extra", "not a flag"},
		{"-port 70000", "want 1 to"},
		{"-port -1", "want 1 to"},
		{"-peers " + peers, "-id NAME"},
		{"-listen 127.0.0.1:1", "-id NAME"},
		{"-http 127.0.0.1:1", "-id NAME"},
		{"-id a -dir d", "-peers is missing"},
		{"-id a -peers " + peers, "-dir is missing"},
		{"-id c -dir d -peers " + peers, "not in -peers"},
		{"-id a -dir d -peers a=127.0.0.1", "is not NAME=HOST:PORT"},
		{"-id a -dir d -peers 127.0.0.1:1", "is not NAME=HOST:PORT"},
		{"-id a -dir d -peers a=127.0.0.1:0", "is not NAME=HOST:PORT"},
		{"-id a -dir d -http 8080 -peers " + peers, "want HOST:PORT"},
		{"-id a -dir d -listen x -peers " + peers, "want HOST:PORT"},
		{"-id a -dir d -port 1 -peers " + peers, "use -http and -peers"},
		{"-id a -peers a=x", "-dir is missing"}, // all complaints at once
		{"-id a -peers a=x", "is not NAME=HOST:PORT"},
	} {
		var stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(c.args), io.Discard, &stderr)
		if want := 2; c.want == "" {
			if code != 0 || !strings.Contains(stderr.String(), "three nodes in this process") {
				t.Errorf("%s: exit code %d, %s", c.args, code, &stderr)
			}
		} else if code != want || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%s: exit code %d, %s\nwant %d and %q", c.args, code, &stderr, want, c.want)
		}
	}
}

// With -dir the data stays, and so do the addresses.
func TestDemoKeepsItsDirectory(t *testing.T) {
	checkLeaks(t)
	web := newClient(t)
	dir, port := t.TempDir(), freePorts(t, 7)
	node := fmt.Sprintf("http://127.0.0.1:%d", port+2)
	demo := func(port int, meanwhile func()) (code int, output string) {
		return runDemoOn(t, web, dir, port, meanwhile)
	}
	code, out := demo(port, func() {
		web.must(t, 201, "PUT", node+"/kv/kept", "still here")
		if code, out := demo(port, nil); code != 1 || !strings.Contains(out, "Is another copy running?") {
			t.Errorf("a second copy: exit code %d, %s", code, out)
		}
	})
	if code != 0 || !strings.Contains(out, node) || !strings.Contains(out, "elected in") {
		t.Errorf("exit code %d, %s", code, out)
	}
	if code, out := demo(freePorts(t, 7), nil); code != 1 || !strings.Contains(out, "with the same ports as before") {
		t.Errorf("with other ports: exit code %d, %s", code, out)
	}
	demo(port, func() {
		if r := web.must(t, 200, "GET", node+"/kv/kept", ""); r.body != "still here" {
			t.Errorf("after a restart: %q", r.body)
		}
	})
}

// runDemoOn runs the program on dir until meanwhile returns, and returns its
// exit code and what it printed.
func runDemoOn(t *testing.T, web *client, dir string, port int, meanwhile func()) (code int, output string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stdout, stderr syncBuffer
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		code = run(ctx, []string{"-dir", dir, "-port", fmt.Sprint(port)}, &stdout, &stderr)
	}()
	eventually(t, "the demo to be up or to give up", func() bool {
		return strings.Contains(stdout.String(), "Ctrl-C") || stderr.String() != ""
	})
	if meanwhile != nil {
		meanwhile()
	}
	stop()
	<-ended
	web.CloseIdleConnections()
	return code, stdout.String() + stderr.String()
}

// syncBuffer is a buffer that a test may read while the program writes.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// build builds the program and returns its path.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kv")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// process is the program, running.
type process struct {
	cmd   *exec.Cmd
	lines chan string
	log   syncBuffer
	done  chan struct{} // closed when it has ended, and err is set
	err   error
}

func startProcess(t *testing.T, path string, env []string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(path, args...), lines: make(chan string, 1000), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stderr = &p.log
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		scanner := bufio.NewScanner(stdout)
		for scanner.Scan() {
			p.lines <- scanner.Text()
		}
		p.err = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
	})
	return p
}

// expect reads the output up to a line that begins with prefix, and returns the
// line's last word.
func (p *process) expect(t *testing.T, prefix string) string {
	t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		select {
		case line := <-p.lines:
			if line = strings.TrimSpace(line); strings.HasPrefix(line, prefix) {
				return line[strings.LastIndex(line, " ")+1:]
			}
		case <-p.done:
			t.Fatalf("the program ended (%v) before it printed %q: %s", p.err, prefix, p.log.String())
		case <-timeout.C:
			t.Fatalf("the program did not print %q: %s", prefix, p.log.String())
		}
	}
}

// signal sends sig and waits for the end.
func (p *process) signal(t *testing.T, sig os.Signal) error {
	t.Helper()
	p.cmd.Process.Signal(sig)
	return p.wait(t, sig.String())
}

func (p *process) wait(t *testing.T, why string) error {
	t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-p.done:
	case <-timeout.C:
		t.Fatalf("%s did not end the program: %s", why, p.log.String())
	}
	return p.err
}

// The program itself, built as a user builds it.
func TestProcesses(t *testing.T) {
	checkLeaks(t)
	program := build(t)
	t.Run("kill -9 of the leader under load", func(t *testing.T) { killNine(t, program) })
	t.Run("interrupts leave nothing", func(t *testing.T) { interrupts(t, program) })
}

// Three processes. The leader's is killed with kill -9 under load; in the end
// all are stopped, started again, and have every acknowledged key.
func killNine(t *testing.T, program string) {
	dir, ports := t.TempDir(), freePorts(t, 6)
	ids := []string{"a", "b", "c"}
	peers := fmt.Sprintf("a=127.0.0.1:%d,b=127.0.0.1:%d,c=127.0.0.1:%d", ports, ports+1, ports+2)
	start := func(i int) *process {
		return startProcess(t, program, nil, "-id", ids[i], "-peers", peers, "-dir", filepath.Join(dir, ids[i]),
			"-http", fmt.Sprintf("127.0.0.1:%d", ports+3+i))
	}
	nodes := make([]*process, 3)
	urls := make([]string, 3)
	for i := range nodes {
		nodes[i] = start(i)
		urls[i] = fmt.Sprintf("http://127.0.0.1:%d", ports+3+i)
	}
	for _, p := range nodes {
		p.expect(t, "leader")
	}
	l := startLoad(t, urls...)
	a := startAdders(t, 2, 150, unbroken, urls...)
	l.waitFor(t, 100)
	a.waitFor(t, 20)
	leader := -1
	eventually(t, "a leader", func() bool {
		leader = leaderOf(l.client, urls)
		return leader >= 0
	})
	killed := time.Now()
	nodes[leader].signal(t, syscall.SIGKILL)
	l.waitFor(t, 100)
	a.waitFor(t, int(a.answered.Load())+20)
	nodes[leader] = start(leader)
	l.waitFor(t, 100)
	l.stop()
	a.check(t)
	t.Logf("%d writes acknowledged, none for %v when the leader was killed", len(l.acked), l.longestGap(killed).Round(time.Millisecond))
	for _, p := range nodes {
		p.cmd.Process.Signal(os.Interrupt)
	}
	for _, p := range nodes {
		if err := p.wait(t, "an interrupt"); err != nil {
			t.Errorf("after an interrupt: %v\n%s", err, p.log.String())
		}
	}
	for i := range nodes {
		nodes[i] = start(i)
	}
	for _, p := range nodes {
		p.expect(t, "leader")
	}
	l.check(t, urls...)
}

// leaderOf returns which node says of itself that it leads, or -1.
func leaderOf(web *client, urls []string) int {
	for i, url := range urls {
		s, err := web.status(url)
		if err != nil {
			continue
		}
		for _, n := range s.Nodes {
			if n.Here && n.Role == "Leader" {
				return i
			}
		}
	}
	return -1
}

// An interrupt or a termination, at any time, ends the demo with exit code 0
// and leaves nothing in the temporary directory.
func interrupts(t *testing.T, program string) {
	for _, c := range []struct {
		name string
		sig  os.Signal
		up   bool // wait until it is up
	}{
		{"interrupt", os.Interrupt, true},
		{"terminate during the election", syscall.SIGTERM, false},
		{"hang up during the election", syscall.SIGHUP, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			tmp := t.TempDir()
			p := startProcess(t, program, []string{"TMPDIR=" + tmp})
			if c.up {
				write := p.expect(t, "page")
				if r := newClient(t).must(t, http.StatusOK, "GET", write, ""); !strings.Contains(r.body, "<title>") {
					t.Error("the page is not served at the address printed")
				}
			} else {
				eventually(t, "the data directories", func() bool { return len(glob(t, tmp, "raft-kv-*/c/*")) > 0 })
			}
			if len(glob(t, tmp, "raft-kv-*")) != 1 {
				t.Error("the demo has no temporary directory")
			}
			if err := p.signal(t, c.sig); err != nil {
				t.Errorf("%v: %v\n%s", c.sig, err, p.log.String())
			}
			if left := glob(t, tmp, "*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func glob(t *testing.T, dir, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return found
}
