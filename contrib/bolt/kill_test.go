package bolt_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"example.com/raft"
	"example.com/raft/contrib/bolt"
)

// childDir tells a process of this test to be the node, in that directory.
const childDir = "BOLT_TEST_CHILD"

// start starts the only node of a cluster in dir.
func start(ctx context.Context, dir string) (*raft.Server, *bolt.Machine, error) {
	m, err := bolt.Open(filepath.Join(dir, "state"), add)
	if err != nil {
		return nil, nil, err
	}
	s, err := raft.Start(ctx, raft.Config{
		ID: "a", ClusterID: "kill", StateMachine: m, Dir: filepath.Join(dir, "raft"),
		Bootstrap:         []raft.Member{{ID: "a", Addr: "127.0.0.1:0"}},
		HeartbeatInterval: 10 * time.Millisecond, ElectionTimeout: 50 * time.Millisecond,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		err = errors.Join(err, m.Close())
	}
	return s, m, err
}

// child is the process that is killed: it prints each answer that it gets. Of
// its three sessions two drop what was answered.
func child(ctx context.Context, dir string) error {
	s, _, err := start(ctx, dir)
	if err != nil {
		return err
	}
	var sessions [3]raft.SessionID
	for i := range sessions {
		if sessions[i], err = s.OpenSession(ctx); err != nil {
			return err
		}
	}
	for seq := uint64(1); ; seq++ {
		for i, session := range sessions {
			id := raft.RequestID{Session: session, Seq: seq}
			if i > 0 {
				id.DoneBelow = seq
			}
			r, err := s.ProposeOnce(ctx, id, []byte("a 1"))
			if err != nil {
				return err
			}
			fmt.Println(id.Session, id.Seq, id.DoneBelow, r.Index, string(r.Data))
		}
	}
}

// A process is killed while it executes requests. Whatever was answered is
// answered alike when the database is opened again, and was executed once.
func TestKill(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		t.Fatal(child(t.Context(), dir))
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	executed := 0
	for round := range 3 {
		answers := killed(t, exe, dir, 40+7*round)
		s, m, err := start(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		newest := map[raft.SessionID]uint64{}
		for id := range answers {
			newest[id.Session] = max(newest[id.Session], id.Seq)
		}
		for id, want := range answers {
			if id.DoneBelow != 0 && id.Seq != newest[id.Session] {
				continue // its result was dropped
			}
			r, err := s.ProposeOnce(t.Context(), id, []byte("a 1"))
			var over *raft.SessionError
			if errors.As(err, &over) && over.Reason == raft.SessionSequence && id.DoneBelow != 0 {
				continue // the request after it was executed, and not answered any more
			}
			if got := fmt.Sprint(r.Index, " ", string(r.Data)); err != nil || got != want {
				t.Errorf("%+v is answered %q, %v, before %q", id, got, err, want)
			}
		}
		executed += len(answers)
		got, err := strconv.Atoi(number(m, "a"))
		if err != nil || got != executed && got != executed+1 {
			t.Errorf("%d requests were executed, %v, %d answered", got, err, executed)
		}
		executed = got
		if err := errors.Join(s.Close(), m.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// killed runs a child until it has answered n requests, kills it, and returns
// what it printed.
func killed(t *testing.T, exe, dir string, n int) map[raft.RequestID]string {
	t.Helper()
	cmd := exec.Command(exe, "-test.run=^TestKill$")
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	answers := map[raft.RequestID]string{}
	lines := bufio.NewScanner(out)
	var said string // by a child that failed
	for lines.Scan() {
		var id raft.RequestID
		var index uint64
		var data string
		if _, err := fmt.Sscan(lines.Text(), &id.Session, &id.Seq, &id.DoneBelow, &index, &data); err != nil {
			said += lines.Text() + "\n"
			continue
		}
		if answers[id] = fmt.Sprint(index, " ", data); len(answers) == n {
			cmd.Process.Kill()
		}
	}
	if err := cmd.Wait(); len(answers) < n {
		t.Fatalf("the process answered %d requests, want %d: %v\n%s", len(answers), n, err, said)
	}
	return answers
}
