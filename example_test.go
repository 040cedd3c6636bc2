package raft_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft"
)

// The type and Example are README's program; TestTidyReadmeProgram compares.

type counter struct{ n int64 }

// Every node applies the same commands in the same order.
func (c *counter) Apply(raft.Entry) []byte { c.n++; return fmt.Append(nil, c.n) }
func (c *counter) Snapshot() (raft.Capture, error) {
	return raft.CaptureBytes(fmt.Append(nil, c.n)), nil
}
func (c *counter) Restore(r io.Reader) error { _, err := fmt.Fscan(r, &c.n); return err }

func Example() {
	ctx := context.Background()
	node, err := raft.Start(ctx, raft.Config{
		ID:           "a",
		ClusterID:    "counters",
		StateMachine: &counter{},
		Storage:      raft.NewMemoryStorage(),                       // or, to survive a crash, Dir: "/var/lib/counter"
		Bootstrap:    []raft.Member{{ID: "a", Addr: "127.0.0.1:0"}}, // or three members on three machines
	})
	if err != nil {
		log.Fatal(err)
	}
	defer node.Close()
	for range 3 {
		result, err := node.Propose(ctx, []byte("+1")) // on any node; returns once it is committed and applied
		if err != nil {
			log.Print(err)
			return
		}
		fmt.Printf("the counter is %s\n", result.Data)
	}
	// Output:
	// the counter is 1
	// the counter is 2
	// the counter is 3
}

// TestCounterOutlivesItsLeader is README's example of a test.
func TestCounterOutlivesItsLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // in virtual time
		h := raft.NewHarness(t, 3, raft.WithStateMachine(func() raft.StateMachine { return &counter{} }))
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		h.SubmitToServer(leader, []byte("+1"))
		h.CheckCommittedN([]byte("+1"), 3)
		h.CrashPeer(leader) // a power cut: what was not synced is gone
		h.CheckSingleLeader()
		h.RestartPeer(leader)
		h.CheckCommittedN([]byte("+1"), 3)
		read := func(m raft.StateMachine) []byte { return fmt.Append(nil, m.(*counter).n) }
		if got := h.Read(leader, read); string(got) != "1" {
			t.Errorf("after the crash the counter is %s, want 1", got)
		}
	})
}

// total is a state machine that adds numbers. Others may read its sum at any time.
type total struct{ sum atomic.Int64 }

func (t *total) Apply(e raft.Entry) []byte {
	n, err := strconv.ParseInt(string(e.Data), 10, 64)
	if err != nil {
		return []byte("not a number") // a refusal is a result, the same on every node
	}
	return strconv.AppendInt(nil, t.sum.Add(n), 10)
}

func (t *total) Snapshot() (raft.Capture, error) {
	return raft.CaptureBytes(fmt.Append(nil, t.sum.Load())), nil
}

func (t *total) Restore(r io.Reader) error {
	var sum int64
	if _, err := fmt.Fscan(r, &sum); err != nil {
		return err
	}
	t.sum.Store(sum)
	return nil
}

// node is the configuration of a node that forms a cluster by itself, with
// deadlines short enough for an example.
func node(m raft.StateMachine) raft.Config {
	return raft.Config{
		ID: "a", ClusterID: "examples", StateMachine: m, Storage: raft.NewMemoryStorage(),
		Bootstrap:         []raft.Member{{ID: "a", Addr: "127.0.0.1:0"}},
		HeartbeatInterval: 10 * time.Millisecond, ElectionTimeout: 50 * time.Millisecond,
		Logger: slog.New(slog.DiscardHandler),
	}
}

func start(c raft.Config) *raft.Server {
	s, err := raft.Start(context.Background(), c)
	if err != nil {
		panic(err)
	}
	return s
}

// cluster starts three nodes on loopback. The listeners come first, so that
// the ports are known when the members are listed.
func cluster() (nodes [3]*raft.Server, machines [3]*total) {
	var listeners [3]net.Listener
	var members []raft.Member
	for i := range listeners {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		listeners[i] = l
		members = append(members, raft.Member{ID: raft.NodeID('a' + rune(i)), Addr: l.Addr().String()})
	}
	for i := range nodes {
		machines[i] = &total{}
		c := node(machines[i])
		c.ID, c.Listener, c.Bootstrap = members[i].ID, listeners[i], members
		c.HeartbeatInterval, c.ElectionTimeout = 50*time.Millisecond, 500*time.Millisecond
		nodes[i] = start(c)
	}
	return nodes, machines
}

// Any node takes proposals: one that does not lead forwards them.
func ExampleServer_Propose() {
	nodes, _ := cluster()
	for _, n := range nodes {
		defer n.Close()
	}
	for i, n := range nodes {
		result, err := n.Propose(context.Background(), fmt.Append(nil, 10*(i+1)))
		fmt.Println(string(result.Data), err)
	}
	// Output:
	// 10 <nil>
	// 30 <nil>
	// 60 <nil>
}

// A command that the cluster can't take is rejected: it will never commit. An
// error that matches ErrOutcomeUnknown says that nobody can tell yet.
func ExampleServer_Propose_rejected() {
	c := node(&total{})
	c.Bootstrap = append(c.Bootstrap, raft.Member{ID: "b", Addr: "127.0.0.1:1"}) // it is never started
	n := start(c)
	defer n.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := n.Propose(ctx, []byte("1"))
	fmt.Println("no leader:", errors.Is(err, raft.ErrNoLeader))
	fmt.Println("unknown:", errors.Is(err, raft.ErrOutcomeUnknown))
	_, err = n.Propose(context.Background(), nil)
	fmt.Println("empty command:", errors.Is(err, raft.ErrCommandSize))
	fmt.Println("waits for:", n.Status().Missing)
	// Output:
	// no leader: true
	// unknown: false
	// empty command: true
	// waits for: [b]
}

// Submit does not wait, so that one goroutine can have many proposals on
// their way. While this node leads, they are applied in the order in which it
// submitted them.
func ExampleServer_Submit() {
	n := start(node(&total{}))
	defer n.Close()

	var proposals []*raft.Proposal
	for i := range 4 {
		proposals = append(proposals, n.Submit(fmt.Append(nil, i)))
	}
	for _, p := range proposals {
		result, err := p.Wait(context.Background())
		fmt.Println(string(result.Data), err)
	}
	// Output:
	// 0 <nil>
	// 1 <nil>
	// 3 <nil>
	// 6 <nil>
}

// A client that never does anything twice: what it has no answer to it sends
// again, with the same RequestID, to one node after the other.
func ExampleServer_ProposeOnce() {
	nodes, _ := cluster()
	for _, n := range nodes {
		defer n.Close()
	}
	session, err := nodes[0].OpenSession(context.Background()) // plain data: it may travel to another process
	if err != nil {
		fmt.Println(err)
		return
	}
	add := func(seq uint64, number string) {
		// One request at a time: the client has the answers to all before.
		id := raft.RequestID{Session: session, Seq: seq, DoneBelow: seq}
		for try := 0; ; try++ {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			result, err := nodes[try%len(nodes)].ProposeOnce(ctx, id, []byte(number))
			cancel()
			if err == nil || errors.Is(err, raft.ErrSessionExpired) { // after the latter: read what happened, open another session
				fmt.Println(string(result.Data), err)
				return
			}
		}
	}
	add(1, "42")
	nodes[0].Close()
	add(1, "42") // perhaps the answer was lost: asking again is safe
	add(2, "8")
	// Output:
	// 42 <nil>
	// 42 <nil>
	// 50 <nil>
}

// A read on any node that includes everything acknowledged before it. Apply runs
// beside it, on another goroutine, so the state machine guards its state, here
// by an atomic, by a mutex where there is more of it.
func ExampleServer_ReadIndex() {
	nodes, machines := cluster()
	for _, n := range nodes {
		defer n.Close()
	}
	ctx := context.Background()
	_, err := nodes[0].Propose(ctx, []byte("42"))
	if err != nil {
		fmt.Println(err)
		return
	}
	for i, n := range nodes {
		_, err := n.ReadIndex(ctx)
		fmt.Println(machines[i].sum.Load(), err)
	}
	// Output:
	// 42 <nil>
	// 42 <nil>
	// 42 <nil>
}

// A node may lag behind the one that acknowledged a write. WaitApplied waits
// until the write can be read here.
func ExampleServer_WaitApplied() {
	nodes, machines := cluster()
	for _, n := range nodes {
		defer n.Close()
	}
	ctx := context.Background()
	result, err := nodes[0].Propose(ctx, []byte("42"))
	if err != nil {
		fmt.Println(err)
		return
	}
	for i, n := range nodes {
		err := n.WaitApplied(ctx, result.Index)
		fmt.Println(machines[i].sum.Load(), err)
	}
	// Output:
	// 42 <nil>
	// 42 <nil>
	// 42 <nil>
}

// A job that only the leader may do runs under the context that
// WaitLeadership returns. The term is a fencing token: give it to whatever the
// job changes, and let that refuse lower ones.
func ExampleServer_WaitLeadership() {
	n := start(node(&total{}))
	leading, term, err := n.WaitLeadership(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("leads term", term)
	n.Close()
	<-leading.Done()
	fmt.Println("the job has to stop:", leading.Err())
	_, _, err = n.WaitLeadership(context.Background())
	fmt.Println(err)
	// Output:
	// leads term 1
	// the job has to stop: context canceled
	// raft: node is stopped
}

// Status is one moment's state. It waits for nothing.
func ExampleServer_Status() {
	n := start(node(&total{}))
	result, err := n.Propose(context.Background(), []byte("5"))
	if err != nil {
		fmt.Println(err)
		return
	}
	st := n.Status()
	fmt.Println(st.Role, "of term", st.Term)
	fmt.Println("committed:", st.Commit >= result.Index, "applied:", st.Applied >= result.Index)
	n.Close()
	fmt.Println(n.Status().Role)
	// Output:
	// Leader of term 1
	// committed: true applied: true
	// Dead
}

// Events yields what happened recently and then what happens, until the node
// is dead.
func ExampleServer_Events() {
	n := start(node(&total{}))
	for e := range n.Events(context.Background()) {
		if e.Kind == raft.EventRole {
			fmt.Println(e.Node, e)
		}
		if e.Role == raft.Leader {
			n.Close() // the loop ends by itself
		}
	}
	// Output:
	// a becomes Candidate (currentTerm=1): no leader was heard from
	// a becomes Leader, term=1: it is elected
}

// A node that starts again in its directory goes on where it was: the state
// machine is given everything committed once more.
func ExampleStart_restart() {
	dir, err := os.MkdirTemp("", "raft")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	for range 3 {
		c := node(&total{})
		c.Storage, c.Dir = nil, dir
		n := start(c)
		result, err := n.Propose(context.Background(), []byte("7"))
		fmt.Println(string(result.Data), err)
		n.Close()
	}
	// Output:
	// 7 <nil>
	// 14 <nil>
	// 21 <nil>
}

// Validate names every bad field at once. Start calls it first.
func ExampleConfig_Validate() {
	err := raft.Config{
		ID:                "a",
		StateMachine:      &counter{},
		Dir:               "data",
		HeartbeatInterval: 3 * time.Second,
		Bootstrap:         []raft.Member{{ID: "a", Addr: "localhost"}},
	}.Validate()
	fmt.Println(err)
	// Output:
	// raft: bad Config:
	// ClusterID: want 1 to 255 bytes, the same on every node; have 0
	// Bootstrap[0].Addr: "localhost" is not host:port
	// ElectionTimeout: 1s is below three times HeartbeatInterval (3s): one late heartbeat would depose a healthy leader, and leaders would churn
}

// A backup is taken from a running cluster and restored as a new one.
func ExampleServer_Backup() {
	ctx := context.Background()
	running := start(node(&total{}))
	running.Propose(ctx, []byte("40"))
	running.Propose(ctx, []byte("2"))
	var backup bytes.Buffer // or a file, or an HTTP response
	if _, err := running.Backup(ctx, &backup); err != nil {
		fmt.Println(err)
	}
	running.Close()

	info, err := raft.VerifyBackup(bytes.NewReader(backup.Bytes()))
	fmt.Printf("a backup of %q up to entry %d, %v\n", info.ClusterID, info.Last.Index, err)

	dir := filepath.Join(os.TempDir(), fmt.Sprintf("raft-example-%d", os.Getpid()))
	defer os.RemoveAll(dir)
	_, err = raft.RestoreBackup(ctx, dir, &backup, raft.RestoreOptions{
		ID: "a", Addr: "127.0.0.1:7000", ClusterID: "restored", FromCluster: "examples",
	})
	if err != nil {
		fmt.Println(err)
	}
	c := node(&total{})
	c.ClusterID, c.Storage, c.Dir = "restored", nil, dir
	restored := start(c)
	defer restored.Close()
	result, err := restored.Propose(ctx, []byte("1")) // AddVoter adds other nodes
	fmt.Printf("the total is %s, %v\n", result.Data, err)
	// Output:
	// a backup of "examples" up to entry 4, <nil>
	// the total is 43, <nil>
}

// Two of three disks are gone. What is left is looked at, and goes on.
func ExampleRecover() {
	ctx := context.Background()
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("raft-recover-%d", os.Getpid()))
	defer os.RemoveAll(dir)
	c := node(&total{}) // stands for three nodes
	c.Storage, c.Dir = nil, dir
	running := start(c)
	running.Propose(ctx, []byte("42"))
	running.Close()

	report := raft.Inspect(ctx, dir)
	fmt.Printf("node %s of cluster %q has entries up to %v\n", report.ID, report.ClusterID, report.Last)

	_, err := raft.Recover(ctx, dir, raft.RecoverOptions{DryRun: true}) // Lost names the voters that are gone
	var refused *raft.RecoverError
	fmt.Println(errors.As(err, &refused) && refused.Reason == raft.RecoverQuorum) // one of one is a majority

	plan, err := raft.Recover(ctx, dir, raft.RecoverOptions{AbandonQuorum: true, Addr: "127.0.0.1:7000"})
	fmt.Printf("kept everything up to %v, goes on with %v, %v\n", plan.Record.Kept, plan.Record.Next, err)

	c.StateMachine = &total{}
	again := start(c)
	defer again.Close()
	result, err := again.Propose(ctx, []byte("1"))
	fmt.Printf("the total is %s, %v; what was done to the directory: %s\n", result.Data, err, again.Status().History[0].What)
	// Output:
	// node a of cluster "examples" has entries up to 3 (term 1)
	// true
	// kept everything up to 3 (term 1), goes on with 4 (term 2000000), <nil>
	// the total is 43, <nil>; what was done to the directory: recovery
}
