package bolt_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"example.com/raft"
	"example.com/raft/contrib/bolt"
)

// add executes "KEY N": it adds N to the number under KEY.
func add(tx *bbolt.Tx, e raft.Entry) ([]byte, error) {
	key, n, _ := strings.Cut(string(e.Data), " ")
	delta, err := strconv.Atoi(n)
	if key == "" || err != nil {
		return []byte("want KEY N"), nil // a refusal is a result, the same on every node
	}
	numbers, err := tx.CreateBucketIfNotExists([]byte("numbers"))
	if err != nil {
		return nil, err
	}
	old, _ := strconv.Atoi(string(numbers.Get([]byte(key))))
	sum := strconv.AppendInt(nil, int64(old+delta), 10)
	return sum, numbers.Put([]byte(key), sum)
}

func number(m *bolt.Machine, key string) (value string) {
	m.View(func(tx *bbolt.Tx) error {
		if b := tx.Bucket([]byte("numbers")); b != nil {
			value = string(b.Get([]byte(key)))
		}
		return nil
	})
	return value
}

// A node on a database: after a restart its state is there at once.
func Example() {
	dir, err := os.MkdirTemp("", "bolt")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	for range 2 {
		machine, err := bolt.Open(filepath.Join(dir, "state"), add)
		if err != nil {
			log.Print(err)
			return
		}
		fmt.Printf("visitors: %q\n", number(machine, "visitors"))
		node, err := raft.Start(ctx, raft.Config{
			ID: "a", ClusterID: "example", StateMachine: machine, Dir: filepath.Join(dir, "raft"),
			Bootstrap:         []raft.Member{{ID: "a", Addr: "127.0.0.1:0"}},
			HeartbeatInterval: 10 * time.Millisecond, ElectionTimeout: 50 * time.Millisecond,
			Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			log.Print(err)
			return
		}
		result, err := node.Propose(ctx, []byte("visitors 7"))
		fmt.Printf("visitors: %q %v\n", result.Data, err)
		if err := errors.Join(node.Close(), machine.Close()); err != nil {
			log.Print(err)
		}
	}
	// Output:
	// visitors: ""
	// visitors: "7" <nil>
	// visitors: "7"
	// visitors: "14" <nil>
}

// cluster runs f in virtual time with three nodes, each with its own database.
func cluster(t *testing.T, f func(t *testing.T, h *raft.Harness, machines []*bolt.Machine)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		machines := make([]*bolt.Machine, 3)
		defer func() {
			for _, m := range machines {
				m.Close()
			}
		}()
		h := raft.NewHarness(t, 3, raft.WithStateMachineOf(func(node int) raft.StateMachine {
			if machines[node] != nil {
				machines[node].Close() // the crash ends that process
			}
			m, err := bolt.Open(filepath.Join(dir, strconv.Itoa(node)), add)
			if err != nil {
				t.Fatal(err)
			}
			machines[node] = m
			return m
		}), raft.WithConfig(func(_ int, c *raft.Config) { c.KeepLogBytes = 1 }))
		defer h.Shutdown()
		f(t, h, machines)
	})
}

func propose(t *testing.T, h *raft.Harness, cmd, want string) {
	t.Helper()
	leader, _ := h.CheckSingleLeader()
	r, err := h.Server(leader).Propose(t.Context(), []byte(cmd))
	if err != nil || string(r.Data) != want {
		t.Fatalf("%s: %q, %v, want %q", cmd, r.Data, err, want)
	}
}

// applied waits until a node has applied what the leader has.
func applied(t *testing.T, h *raft.Harness, node int) {
	t.Helper()
	leader, _ := h.CheckSingleLeader()
	if err := h.Server(node).WaitApplied(t.Context(), h.Server(leader).Status().Applied); err != nil {
		t.Fatal(err)
	}
}

// Crashed nodes go on from their databases; each command counts once.
func TestCrashes(t *testing.T) {
	cluster(t, func(t *testing.T, h *raft.Harness, machines []*bolt.Machine) {
		for i := range 30 {
			propose(t, h, "a 2", strconv.Itoa(2*(i+1)))
			h.CrashPeer(i % 3)
			h.RestartPeer(i % 3)
		}
		for i := range 3 {
			applied(t, h, i)
			if got := number(machines[i], "a"); got != "60" {
				t.Errorf("node %d has %q, want 60", i, got)
			}
		}
	})
}

// A node that missed what was compacted gets another node's database.
func TestSnapshot(t *testing.T) {
	cluster(t, func(t *testing.T, h *raft.Harness, machines []*bolt.Machine) {
		leader, _ := h.CheckSingleLeader()
		behind := (leader + 1) % 3
		h.CrashPeer(behind)
		for i := range 20 {
			propose(t, h, "a 1", strconv.Itoa(i+1))
		}
		h.TakeSnapshot(leader)
		h.TakeSnapshot((leader + 2) % 3)
		h.RestartPeer(behind)
		applied(t, h, behind)
		if got := number(machines[behind], "a"); got != "20" {
			t.Fatalf("it has %q, want 20", got)
		}
		h.CrashPeer(behind)
		h.RestartPeer(behind)
		applied(t, h, behind)
		propose(t, h, "a 1", "21")
	})
}

// What a session was answered stays its answer after a crash, and adds nothing
// a second time: the database has both in one transaction.
func TestSession(t *testing.T) {
	cluster(t, func(t *testing.T, h *raft.Harness, machines []*bolt.Machine) {
		h.CheckSingleLeader()
		session, err := h.Server(0).OpenSession(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			id := raft.RequestID{Session: session, Seq: uint64(i + 1), DoneBelow: uint64(i + 1)}
			for try := range 3 {
				r, err := h.Server((i+try)%3).ProposeOnce(t.Context(), id, []byte("a 1"))
				if err != nil || string(r.Data) != strconv.Itoa(i+1) {
					t.Fatalf("request %d, try %d: %q, %v", i+1, try, r.Data, err)
				}
				if try == 0 {
					h.CrashPeer(i % 3)
					h.RestartPeer(i % 3)
				}
			}
		}
		for i := range 3 {
			applied(t, h, i)
			if got := number(machines[i], "a"); got != "20" {
				t.Errorf("node %d has %q, want 20", i, got)
			}
		}
	})
}

// A failing transaction changes nothing, and the node says why it stopped.
func TestApplyFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		fail := true
		path := filepath.Join(t.TempDir(), "state")
		apply := func(tx *bbolt.Tx, e raft.Entry) ([]byte, error) {
			r, err := add(tx, e)
			if fail {
				err = broken
			}
			return r, err
		}
		var m *bolt.Machine
		h := raft.NewHarness(t, 1, raft.WithStateMachine(func() raft.StateMachine {
			if m != nil {
				m.Close()
			}
			var err error
			if m, err = bolt.Open(path, apply); err != nil {
				t.Fatal(err)
			}
			return m
		}))
		defer func() { m.Close() }()
		defer h.Shutdown()
		h.CheckSingleLeader()
		if _, err := h.Server(0).Propose(t.Context(), []byte("a 1")); !errors.Is(err, broken) {
			t.Fatalf("Propose: %v", err)
		}
		if got := number(m, "a"); got != "" {
			t.Fatalf("a transaction that failed left %q", got)
		}
		h.CrashPeer(0)
		fail = false
		h.RestartPeer(0)
		propose(t, h, "a 1", "2")
	})
}

// A Restore of what is no database fails and leaves the old one.
func TestRestoreGarbage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	m, err := bolt.Open(path, add)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.ApplyOnDisk([]raft.Entry{{Index: 2, Data: []byte("a 1")}}, make([][]byte, 1), func() []byte { return []byte("meta") }); err != nil {
		t.Fatal(err)
	}
	if err := m.RestoreOnDisk(strings.NewReader(strings.Repeat("garbage", 10_000)), []byte("other")); err == nil {
		t.Fatal("garbage was restored")
	}
	if meta, err := m.Meta(); err != nil || string(meta) != "meta" || number(m, "a") != "1" {
		t.Fatalf("meta %q, %v, a %q", meta, err, number(m, "a"))
	}
	if _, err := os.Stat(path + ".restore"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a file was left: %v", err)
	}
}
