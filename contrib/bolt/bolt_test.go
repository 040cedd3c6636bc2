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

// rows returns the library's table as LoadMeta gives it.
func rows(t *testing.T, m *bolt.Machine) string {
	t.Helper()
	var b strings.Builder
	if err := m.LoadMeta(func(key, value []byte) error {
		fmt.Fprintf(&b, "%s=%s ", key, value)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// The table has what was set last, and a snapshot's table is replaced whole:
// neither a row of the old state nor one that came with the snapshot stays.
func TestTable(t *testing.T) {
	set := func(key, value string) raft.MetaChange {
		return raft.MetaChange{Key: []byte(key), Value: []byte(value)}
	}
	machines := make([]*bolt.Machine, 2)
	for i := range machines {
		m, err := bolt.Open(filepath.Join(t.TempDir(), "state"), add)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		machines[i] = m
		for _, changes := range [][]raft.MetaChange{
			{set("a", "1"), set("b", "1")},
			{set("own", strconv.Itoa(i)), {Key: []byte("a")}, set("c"+strconv.Itoa(i), "1")},
		} {
			if err := m.ApplyOnDisk(nil, nil, func() []raft.MetaChange { return changes }); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := rows(t, machines[0]); got != "b=1 c0=1 own=0 " {
		t.Fatalf("rows %q", got)
	}
	c, err := machines[1].Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var snapshot strings.Builder
	if err := c.WriteTo(t.Context(), &snapshot); err != nil {
		t.Fatal(err)
	}
	if err := machines[0].RestoreOnDisk(strings.NewReader(snapshot.String()), []raft.MetaChange{set("x", "1"), set("y", "2")}); err != nil {
		t.Fatal(err)
	}
	if got := rows(t, machines[0]); got != "x=1 y=2 " {
		t.Fatalf("rows %q after a snapshot was restored", got)
	}
	failed := errors.New("stop here")
	if err := machines[0].LoadMeta(func(_, _ []byte) error { return failed }); !errors.Is(err, failed) {
		t.Fatalf("LoadMeta: %v", err)
	}
}

// client asks requests of many sessions and remembers the answers.
type client struct {
	t        *testing.T
	h        *raft.Harness
	sessions []raft.SessionID
	answers  map[raft.RequestID]raft.Result // the newest of each session
}

func (c *client) open(node, n int) {
	c.t.Helper()
	c.h.CheckSingleLeader()
	c.sessions, c.answers = nil, map[raft.RequestID]raft.Result{}
	for range n {
		id, err := c.h.Server(node).OpenSession(c.t.Context())
		if err != nil {
			c.t.Fatal(err)
		}
		c.sessions = append(c.sessions, id)
	}
}

func (c *client) ask(node int, id raft.RequestID) raft.Result {
	c.t.Helper()
	r, err := c.h.Server(node).ProposeOnce(c.t.Context(), id, []byte("a 1"))
	if err != nil {
		c.t.Fatalf("%+v at node %d: %v", id, node, err)
	}
	return r
}

// next asks request seq of each session. Every second one keeps the answers.
func (c *client) next(node int, seq uint64) {
	c.t.Helper()
	for i, s := range c.sessions {
		id := raft.RequestID{Session: s, Seq: seq, DoneBelow: 1}
		if i%2 == 0 {
			id.DoneBelow = seq
			delete(c.answers, raft.RequestID{Session: s, Seq: seq - 1, DoneBelow: seq - 1})
		}
		c.answers[id] = c.ask(node, id)
	}
}

// again asks everything once more, which executes nothing.
func (c *client) again(node int, want string, m *bolt.Machine) {
	c.t.Helper()
	for id, r := range c.answers {
		if got := c.ask(node, id); got.Index != r.Index || got.Term != r.Term || string(got.Data) != string(r.Data) {
			c.t.Errorf("%+v at node %d is answered %+v, before %+v", id, node, got, r)
		}
	}
	if got := number(m, "a"); got != want {
		c.t.Errorf("node %d has %q, want %s", node, got, want)
	}
}

// Sessions are in the database that a node is opened with again: as it was, with
// the newest transactions lost, and with another node's in its place.
func TestSessionsReopen(t *testing.T) {
	cluster(t, func(t *testing.T, h *raft.Harness, machines []*bolt.Machine) {
		c := &client{t: t, h: h}
		c.open(0, 20)
		c.next(0, 1)
		c.next(1, 2)
		applied(t, h, 2)
		older := filepath.Join(t.TempDir(), "older")
		path := ""
		if err := machines[2].View(func(tx *bbolt.Tx) error {
			path = tx.DB().Path()
			return tx.CopyFile(older, 0o600)
		}); err != nil {
			t.Fatal(err)
		}
		c.next(2, 3)
		for i := range 3 {
			h.CrashPeer(i)
			h.RestartPeer(i)
			applied(t, h, i)
			c.again(i, "60", machines[i])
		}
		h.CrashPeer(2)
		if err := errors.Join(machines[2].Close(), os.Rename(older, path)); err != nil {
			t.Fatal(err)
		}
		h.RestartPeer(2)
		applied(t, h, 2)
		c.again(2, "60", machines[2])

		leader, _ := h.CheckSingleLeader()
		behind := (leader + 1) % 3
		h.CrashPeer(behind)
		old := c.sessions
		c.open(leader, 5)
		c.next(leader, 1)
		for _, s := range old { // the leader's database has them until the next command
			if err := h.Server(leader).CloseSession(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		h.TakeSnapshot(leader)
		h.TakeSnapshot((leader + 2) % 3)
		h.RestartPeer(behind)
		applied(t, h, behind)
		for range 2 {
			c.again(behind, "65", machines[behind])
			h.CrashPeer(behind)
			h.RestartPeer(behind)
			applied(t, h, behind)
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
	row := func(value string) []raft.MetaChange {
		return []raft.MetaChange{{Key: []byte("k"), Value: []byte(value)}}
	}
	if err := m.ApplyOnDisk([]raft.Entry{{Index: 2, Data: []byte("a 1")}}, make([][]byte, 1), func() []raft.MetaChange { return row("v") }); err != nil {
		t.Fatal(err)
	}
	if err := m.RestoreOnDisk(strings.NewReader(strings.Repeat("garbage", 10_000)), row("other")); err == nil {
		t.Fatal("garbage was restored")
	}
	if got := rows(t, m); got != "k=v " || number(m, "a") != "1" {
		t.Fatalf("rows %q, a %q", got, number(m, "a"))
	}
	if _, err := os.Stat(path + ".restore"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a file was left: %v", err)
	}
}
