package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/raft/internal/memnet"
)

// TB is what the harness needs of a *testing.T. If it also has the methods
// Output() io.Writer and ArtifactDir() string, as testing.T has, they are used.
type TB interface {
	Helper()
	Name() string
	Failed() bool
	Cleanup(func())
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Harness is a cluster of real Servers for tests, on a network and disks that
// can be made to fail. Nodes are numbered from 0; node i has the ID strconv.Itoa(i).
//
// It works in a bubble of testing/synctest, where time is virtual and a minute
// passes in milliseconds, and outside of one. Everywhere in this file a node is
// connected if it runs and DisconnectPeer was not called for it.
//
// Checks that something is so wait for it, for up to 10 election timeouts;
// checks that something is not so look once, now. Methods must be called from
// the test's goroutine, because they may end the test. Beside what the checks
// look at, a harness fails its test when two nodes apply different entries at
// one index, when a node fails that CrashPeer was not called for, and when a
// node leaves something behind.
type Harness struct {
	t        TB
	n        int // founders; nodes from n on were added
	options  harnessOptions
	net      harnessNet
	nodes    []*harnessNode
	log      *harnessLog
	dice     *rand.Rand    // of disks and of Drop; guarded by mu where the network draws
	patience time.Duration // for how long checks wait
	poll     time.Duration // how often they look

	partition []int // the group of each node; nil: one group
	leaders   map[Term]int
	watchdog  *time.Timer
	watching  chan struct{} // holds one token while the watchdog or Shutdown acts
	down      bool          // Shutdown was called

	mu      sync.Mutex
	servers []*Server       // all that were ever started, for the watchdog
	applied map[Index]Entry // by any node, ever
	history history
	drops   []callDrops
	lossy   map[[2]int]bool // connections between these swallow what is written
	loss    float64         // of writes, chosen by dice
}

// harnessNode is one node of a harness, through all its restarts.
type harnessNode struct {
	id           int
	addr         string
	server       *Server
	machine      *harnessMachine
	disk         *harnessDisk
	running      bool // not crashed
	disconnected bool
	paused       bool
}

// callDrops is what PeerDropCallsAfterN asked for.
type callDrops struct {
	on   bool
	left int // calls that still get through
}

type harnessOptions struct {
	configure func(node int, c *Config)
	machine   func(node int) StateMachine
	tcp       bool
	dir       string
	seed      uint64
	limit     time.Duration
}

// HarnessOption changes what NewHarness makes.
type HarnessOption func(*harnessOptions)

// WithConfig has f change each node's configuration, whenever the node starts.
// Timing that Validate refuses as unstable is accepted. A Storage or Dir that f
// sets replaces the harness's disk.
func WithConfig(f func(node int, c *Config)) HarnessOption {
	return func(o *harnessOptions) { o.configure = f }
}

// WithStateMachine makes the state machine of each node, at each start. Without
// it the machine returns each command as its result.
func WithStateMachine(f func() StateMachine) HarnessOption {
	return func(o *harnessOptions) { o.machine = func(int) StateMachine { return f() } }
}

// WithStateMachineOf is WithStateMachine for machines that keep something from
// one start of a node to the next, as an OnDisk machine does its database.
func WithStateMachineOf(f func(node int) StateMachine) HarnessOption {
	return func(o *harnessOptions) { o.machine = f }
}

// WithTCP connects the nodes by TCP on the loopback interface, outside of
// bubbles. A cut resets connections then, and Pause and Delay are not there.
func WithTCP() HarnessOption { return func(o *harnessOptions) { o.tcp = true } }

// WithDisk keeps each node's data in a real directory below dir. CrashPeer then
// ends a node as kill -9 does: what the node had not handed to the operating
// system is lost. Without this option disks are in memory, and CrashPeer cuts
// their power.
func WithDisk(dir string) HarnessOption { return func(o *harnessOptions) { o.dir = dir } }

// WithSeed sets the seed of the faults: what a power cut leaves of unsynced
// writes, how long a delay is, what Drop loses. A harness without it draws one
// and logs it. The order in which goroutines run is not replayed by it.
func WithSeed(seed uint64) HarnessOption { return func(o *harnessOptions) { o.seed = seed } }

// WithTimeLimit makes the harness fail the test and stop all nodes after d, so
// that a call that would hang for ever in virtual time ends. The default is 24 hours.
func WithTimeLimit(d time.Duration) HarnessOption { return func(o *harnessOptions) { o.limit = d } }

// NewHarness starts a cluster of n founders and registers Shutdown as a Cleanup.
// Nodes have a HeartbeatInterval of 50 ms and an ElectionTimeout of 150 ms.
func NewHarness(t TB, n int, opts ...HarnessOption) *Harness {
	t.Helper()
	h := &Harness{
		t: t, n: n, watching: make(chan struct{}, 1),
		options: harnessOptions{seed: rand.Uint64(), limit: 24 * time.Hour},
		log:     newHarnessLog(t),
		leaders: map[Term]int{},
		applied: map[Index]Entry{},
		drops:   make([]callDrops, n),
		lossy:   map[[2]int]bool{},
	}
	for _, o := range opts {
		o(&h.options)
	}
	h.dice = rand.New(rand.NewPCG(h.options.seed, 0))
	if h.options.tcp {
		h.net = newTCPNet(h.verdict)
	} else {
		h.net = newMemNet(n, h.options.seed, h.verdict)
	}
	t.Cleanup(h.Shutdown)
	h.watchdog = time.AfterFunc(h.options.limit, h.timeUp)
	h.action("Start %d nodes, faults' seed %d (WithSeed)", n, h.options.seed)
	for i := range n {
		h.nodes = append(h.nodes, &harnessNode{id: i, addr: harnessAddr(i), disk: h.newDisk(i)})
	}
	for i := range n {
		h.start(i)
	}
	return h
}

// start starts node i, for the first time or again.
func (h *Harness) start(i int) {
	h.t.Helper()
	node := h.nodes[i]
	c, err := h.config(i)
	if err != nil {
		h.t.Fatalf("node %d: %v", i, err)
		return
	}
	h.patience = max(h.patience, 10*c.ElectionTimeout)
	h.poll = max(h.patience/1000, time.Millisecond)
	s, err := Start(context.Background(), c)
	if err != nil {
		h.t.Fatalf("start node %d: %v", i, err)
		return
	}
	node.server, node.running = s, true
	h.mu.Lock()
	h.servers = append(h.servers, s)
	h.mu.Unlock()
}

// config makes the configuration of one start of node i.
func (h *Harness) config(i int) (Config, error) {
	node := h.nodes[i]
	node.machine = h.newMachine(i)
	c := Config{
		ID: NodeID(strconv.Itoa(i)), ClusterID: "harness", StateMachine: node.machine.shape(),
		HeartbeatInterval: 50 * time.Millisecond, ElectionTimeout: 150 * time.Millisecond,
		DialContext: h.net.dialer(i), Logger: h.log.logger(strconv.Itoa(i)),
		MaxSegmentBytes: 4 << 20, unstableTiming: true, history: &h.history,
	}
	if !h.options.tcp {
		c.closeGrace = 100 * time.Millisecond
	}
	for j := range h.n {
		c.Bootstrap = append(c.Bootstrap, Member{ID: NodeID(strconv.Itoa(j)), Addr: harnessAddr(j)})
	}
	if i >= h.n {
		c.Bootstrap = nil // it waits to be added
	}
	if h.options.configure != nil {
		h.options.configure(i, &c)
	}
	if c.Storage == nil && c.Dir == "" {
		c.Storage = node.disk.storage(c)
	}
	var err error
	c.Listener, err = h.net.listen(i)
	return c, err
}

// Shutdown stops every node and checks that nothing of it is left. Calling it
// again does nothing.
func (h *Harness) Shutdown() {
	h.t.Helper()
	if h.down {
		return
	}
	h.watchdog.Stop()
	h.watching <- struct{}{}
	defer func() { <-h.watching }()
	h.down = true
	h.action("Shutdown")
	for _, node := range h.nodes {
		if node.running {
			if err := node.server.Err(); err != nil {
				h.t.Errorf("node %d has ended by itself: %v; if that was meant, call CrashPeer, and to stop a node call that and not Close", node.id, err)
			}
			h.close(node)
		}
	}
	clean := true
	for _, node := range h.nodes {
		clean = clean && (node.server == nil || isClosed(node.server.Done()))
	}
	if left := h.net.close(); left > 0 && clean {
		h.t.Errorf("%d connections or listeners were left open by stopped nodes", left)
	}
	h.log.close()
}

// close closes the server of a node, waiting also for what Close can't interrupt.
func (h *Harness) close(node *harnessNode) {
	h.t.Helper()
	node.running = false
	node.disk.hurry()
	if err := node.server.Close(); err != nil {
		h.action("%d: %v", node.id, err)
		patience := time.NewTimer(harnessCloseLimit)
		defer patience.Stop()
		select {
		case <-node.server.Done():
		case <-patience.C:
			h.t.Errorf("node %d did not stop within %v: %v", node.id, harnessCloseLimit, err)
			return
		}
	}
	if left := node.disk.openFiles(); left > 0 {
		h.t.Errorf("node %d left %d files or locks open", node.id, left)
	}
}

const harnessCloseLimit = 10 * time.Second

// timeUp ends whatever hangs by stopping the nodes. It runs on a goroutine of
// its own, so it can't end the test itself.
func (h *Harness) timeUp() {
	h.watching <- struct{}{}
	defer func() { <-h.watching }()
	if h.down {
		return
	}
	h.t.Errorf("the test's time limit of %v is over (WithTimeLimit); stopping all nodes", h.options.limit)
	h.mu.Lock()
	servers := slices.Clone(h.servers)
	h.mu.Unlock()
	for _, s := range servers {
		s.Close()
	}
}

// action logs what the test does to the cluster.
func (h *Harness) action(format string, args ...any) {
	h.log.line("TEST", fmt.Sprintf(format, args...))
}

// node returns node i and ends the test if there is none.
func (h *Harness) node(i int) *harnessNode {
	h.t.Helper()
	if i < 0 || i >= len(h.nodes) {
		h.t.Fatalf("there is no node %d, only 0 to %d", i, len(h.nodes)-1)
	}
	return h.nodes[i]
}

// Add starts a new node and has the leader add it as a voter. It returns the
// node's number once the node votes.
func (h *Harness) Add() int {
	h.t.Helper()
	i := h.startNew()
	h.action("Add %d", i)
	h.lead("Add", func(ctx context.Context, s *Server) error {
		return s.AddVoter(ctx, Member{ID: NodeID(strconv.Itoa(i)), Addr: harnessAddr(i)})
	})
	return i
}

// startNew starts a node with an empty disk that waits to be added.
func (h *Harness) startNew() int {
	h.t.Helper()
	i := len(h.nodes)
	h.net.grow(i + 1)
	h.mu.Lock()
	h.drops = append(h.drops, callDrops{})
	h.mu.Unlock()
	if h.partition != nil {
		h.partition = append(h.partition, 0)
	}
	h.nodes = append(h.nodes, &harnessNode{id: i, addr: harnessAddr(i), disk: h.newDisk(i)})
	h.rewire()
	h.start(i)
	return i
}

// Remove has the leader take node i out of the cluster. The node goes on running.
func (h *Harness) Remove(i int) {
	h.t.Helper()
	id := NodeID(strconv.Itoa(h.node(i).id))
	h.action("Remove %d", i)
	h.lead("Remove", func(ctx context.Context, s *Server) error { return s.Remove(ctx, id) })
}

// Transfer has the leader hand leadership to node i.
func (h *Harness) Transfer(i int) {
	h.t.Helper()
	id := NodeID(strconv.Itoa(h.node(i).id))
	h.action("Transfer to %d", i)
	h.lead("Transfer", func(ctx context.Context, s *Server) error { return s.TransferLeadership(ctx, id) })
}

// TakeSnapshot has node i store a snapshot of its state machine.
func (h *Harness) TakeSnapshot(i int) {
	h.t.Helper()
	s := h.node(i).server
	h.action("TakeSnapshot %d", i)
	ctx, cancel := context.WithTimeout(context.Background(), h.patience)
	defer cancel()
	if err := s.TakeSnapshot(ctx); err != nil {
		h.t.Fatalf("TakeSnapshot of node %d: %v", i, err)
	}
}

// lead has the leader do what only a leader can, and tries again where another
// leader or a little later may succeed.
func (h *Harness) lead(what string, f func(context.Context, *Server) error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), h.patience)
	defer cancel()
	for {
		leader, _ := h.CheckSingleLeader()
		err := f(ctx, h.nodes[leader].server)
		var m *MembershipError
		var t *TransferError
		again := errors.As(err, &m) && (m.Reason == MembershipNotLeader || m.Reason == MembershipTooEarly) ||
			errors.As(err, &t) && t.Reason == TransferNotLeader
		switch {
		case err == nil:
			return
		case !again || ctx.Err() != nil:
			h.t.Fatalf("%s: %v", what, err)
			return
		}
		pause := time.NewTimer(h.poll)
		<-pause.C
	}
}

// DisconnectPeer pulls node i's cables: nothing gets to it or comes from it.
// What is under way arrives after ReconnectPeer, as with TCP.
func (h *Harness) DisconnectPeer(i int) {
	h.t.Helper()
	h.node(i).disconnected = true
	h.action("Disconnect %d", i)
	h.rewire()
}

// ReconnectPeer undoes DisconnectPeer.
func (h *Harness) ReconnectPeer(i int) {
	h.t.Helper()
	h.node(i).disconnected = false
	h.action("Reconnect %d", i)
	h.rewire()
}

// Partition lets only nodes of one group talk to each other. Nodes that no
// group names form one more group. It replaces an earlier partition.
func (h *Harness) Partition(groups ...[]int) {
	h.t.Helper()
	h.partition = make([]int, len(h.nodes))
	for g, group := range groups {
		for _, i := range group {
			h.partition[h.node(i).id] = g + 1
		}
	}
	h.action("Partition %v", groups)
	h.rewire()
}

// Heal makes the network whole: it undoes Partition, DisconnectPeer, Pause,
// PeerDropCallsAfterN, Delay and Drop. It does not restart crashed nodes.
func (h *Harness) Heal() {
	h.t.Helper()
	h.action("Heal")
	h.partition = nil
	for i, node := range h.nodes {
		node.disconnected = false
		if node.paused {
			h.Resume(i)
		}
		h.PeerDontDropCalls(i)
	}
	h.setLoss(0)
	if !h.options.tcp {
		h.net.delay(0, 0)
	}
	h.rewire()
}

// rewire tells the network who reaches whom.
func (h *Harness) rewire() {
	for i, a := range h.nodes {
		for j, b := range h.nodes[:i] {
			together := h.partition == nil || h.partition[i] == h.partition[j]
			h.net.connect(i, j, together && !a.disconnected && !b.disconnected)
		}
	}
}

// Pause makes node i seem hung to all others, as a stopped process does:
// connections to it are accepted by nobody's haste, and what is sent either way
// is held until Resume. Its own timers run on, which a stopped process's do not.
func (h *Harness) Pause(i int) {
	h.t.Helper()
	h.node(i).paused = true
	h.action("Pause %d", i)
	h.stall(i, true)
}

// Resume undoes Pause.
func (h *Harness) Resume(i int) {
	h.t.Helper()
	h.node(i).paused = false
	h.action("Resume %d", i)
	h.stall(i, false)
}

func (h *Harness) stall(i int, on bool) {
	h.t.Helper()
	for j, other := range h.nodes {
		if j != i && !h.net.stall(i, j, on || other.paused) {
			h.t.Fatalf("Pause needs the in-memory network, without WithTCP")
		}
	}
}

// Delay makes everything that is sent arrive later by between floor and
// ceiling: half of it by less than 1.8 times floor, a hundredth by more than 46
// times. Delay(0, 0) ends that.
func (h *Harness) Delay(floor, ceiling time.Duration) {
	h.t.Helper()
	h.action("Delay %v to %v", floor, ceiling)
	if !h.net.delay(floor, ceiling) {
		h.t.Fatalf("Delay needs the in-memory network, without WithTCP")
	}
}

// Drop loses a fraction of all that is sent, 0 to 1. As on a network below TCP,
// where a loss lasts the connection is lost with it: half of the losses reset
// it, and the others swallow everything after it until it is given up.
func (h *Harness) Drop(fraction float64) {
	h.action("Drop %g", fraction)
	h.setLoss(fraction)
}

func (h *Harness) setLoss(fraction float64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.loss = fraction
}

// PeerDropCallsAfterN lets the next n calls (RequestVote, AppendEntries,
// forwarded proposals) that node i makes get through and loses all later ones.
func (h *Harness) PeerDropCallsAfterN(i, n int) {
	h.t.Helper()
	h.node(i)
	h.action("Drop calls of %d after %d", i, n)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drops[i] = callDrops{on: true, left: n}
}

// PeerDontDropCalls undoes PeerDropCallsAfterN. Connections that have lost a
// call are reset.
func (h *Harness) PeerDontDropCalls(i int) {
	h.t.Helper()
	h.node(i)
	h.mu.Lock()
	on := h.drops[i].on
	h.drops[i] = callDrops{}
	var broken [][2]int
	for link := range h.lossy {
		if link[0] == i {
			broken = append(broken, link)
			delete(h.lossy, link)
		}
	}
	h.mu.Unlock()
	if on {
		h.action("Don't drop calls of %d", i)
	}
	for _, link := range broken {
		h.net.reset(link[0], link[1])
	}
}

// verdict decides about one write of node from to node to.
func (h *Harness) verdict(from, to int, p []byte) memnet.Verdict {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := &h.drops[from]; d.on {
		if calls := countCalls(p); calls > d.left {
			d.left = 0
			h.lossy[[2]int{from, to}] = true
			return memnet.Drop
		} else {
			d.left -= calls
		}
	}
	if h.loss > 0 && h.dice.Float64() < h.loss {
		if h.dice.IntN(2) == 0 {
			return memnet.Break
		}
		return memnet.Drop
	}
	return memnet.Pass
}

// CrashPeer ends node i as a power cut does, keeping what was synced; what was
// not is lost, torn or kept, as the dice have it. See also WithDisk. A node
// that has failed by itself may be crashed too.
func (h *Harness) CrashPeer(i int) {
	h.t.Helper()
	node := h.node(i)
	if !node.running {
		h.t.Fatalf("CrashPeer: node %d does not run", i)
		return
	}
	h.action("Crash %d", i)
	h.mu.Lock() // guards the dice
	node.disk.crash(h.dice)
	h.mu.Unlock()
	h.close(node)
}

// RestartPeer starts a crashed node with what is left of its disk and a new
// state machine, and connects it.
func (h *Harness) RestartPeer(i int) {
	h.t.Helper()
	node := h.node(i)
	if node.running {
		h.t.Fatalf("RestartPeer: node %d runs; crash it first", i)
		return
	}
	h.action("Restart %d", i)
	node.disconnected = false
	h.rewire()
	h.start(i)
}

// SlowDisk makes each sync of node i's disk take longer by d; 0 ends that. It
// has no effect on a Storage or Dir that WithConfig has set.
func (h *Harness) SlowDisk(i int, d time.Duration) {
	h.t.Helper()
	h.node(i).disk.slow(d)
	h.action("Slow disk of %d by %v", i, d)
}

// FillDisk leaves node i's disk without space for anything but what was claimed
// before. It needs a disk in memory: without WithDisk, and without a Storage or
// Dir of WithConfig.
func (h *Harness) FillDisk(i int) {
	h.t.Helper()
	if mem := h.node(i).disk.mem; mem != nil {
		mem.SetCapacity(max(1, mem.Used()))
	} else {
		h.t.Fatalf("FillDisk needs disks in memory, without WithDisk")
	}
	h.action("Fill disk of %d", i)
}

// FreeDisk undoes FillDisk.
func (h *Harness) FreeDisk(i int) {
	h.t.Helper()
	if mem := h.node(i).disk.mem; mem != nil {
		mem.SetCapacity(0)
	}
	h.action("Free disk of %d", i)
}

// Server returns node i's server, the last one if the node has crashed. It is
// the harness's to close: CrashPeer stops a node. RestartPeer makes another
// server, so what a test runs beside a node, as its jobs, has to be started anew.
func (h *Harness) Server(i int) *Server {
	h.t.Helper()
	return h.node(i).server
}

// StateMachine returns what WithStateMachine's function has made for node i,
// for its newest start.
func (h *Harness) StateMachine(i int) StateMachine {
	h.t.Helper()
	return h.node(i).machine.user
}

// Read calls f with node i's state machine, while nothing is applied to it, and
// returns what f returns. It is a local read: what it sees may be old.
func (h *Harness) Read(i int, f func(StateMachine) []byte) []byte {
	h.t.Helper()
	return h.node(i).machine.read(f)
}

// SubmitToServer appends cmd to the log of node i and returns its index there,
// or false if node i does not lead or takes nothing now. It does not wait:
// whether cmd will be committed is not known yet.
func (h *Harness) SubmitToServer(i int, cmd []byte) (Index, bool) {
	h.t.Helper()
	s := h.node(i).server
	if len(cmd) == 0 || len(cmd) > s.conf.MaxCommandBytes {
		h.t.Fatalf("SubmitToServer: a command has 1 to %d bytes, this one %d", s.conf.MaxCommandBytes, len(cmd))
		return 0, false
	}
	var b entryBuilder
	b.add(entryCommand, cmd)
	var index Index
	s.cm.step(func(c *core) {
		if c.role == Leader && c.hasRoom() && !c.outOfSpace() && s.cm.roomFor(len(b.buf)) > 0 {
			first, _ := c.propose(&b)
			index = first.Index
		}
	})
	if index > 0 {
		h.history.submitted(s.conf.ID, cmd, nil, &Proposal{done: make(chan struct{})}) // nobody waits for its answer
	}
	h.action("Submit %.40q to %d: index %d", cmd, i, index)
	return index, index > 0
}

// eventually calls ok until it returns true, or for up to 10 election timeouts.
func (h *Harness) eventually(ok func() bool) bool {
	if ok() {
		return true
	}
	end := time.NewTimer(h.patience)
	defer end.Stop()
	tick := time.NewTicker(h.poll)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if ok() {
				return true
			}
		case <-end.C:
			return ok()
		}
	}
}

func (h *Harness) connected(i int) bool {
	return h.nodes[i].running && !h.nodes[i].disconnected
}

// connectedNodes returns the nodes that run and are not disconnected.
func (h *Harness) connectedNodes() (nodes []int) {
	for i := range h.nodes {
		if h.connected(i) {
			nodes = append(nodes, i)
		}
	}
	return nodes
}

// leader returns who of nodes leads in the highest term. It ends the test if two
// nodes have led in one term.
func (h *Harness) leader(nodes []int) (leader int, term Term, found bool) {
	h.t.Helper()
	for _, i := range nodes {
		st := h.nodes[i].server.Status()
		if st.Role != Leader {
			continue
		}
		if other, known := h.leaders[st.Term]; known && other != i {
			h.t.Fatalf("both %d and %d lead in term %d", other, i, st.Term)
		}
		h.leaders[st.Term] = i
		if !found || st.Term > term {
			leader, term, found = i, st.Term, true
		}
	}
	return leader, term, found
}

// CheckSingleLeader waits until a connected node leads and returns it and its
// term. If several do, in different terms, it returns that of the highest term;
// the others have not heard of it yet.
func (h *Harness) CheckSingleLeader() (node int, term Term) {
	h.t.Helper()
	if !h.eventually(func() (found bool) {
		h.t.Helper()
		node, term, found = h.leader(h.connectedNodes())
		return found
	}) {
		h.t.Fatalf("no leader among the connected nodes %v within %v:%s", h.connectedNodes(), h.patience, h.describe())
	}
	return node, term
}

// CheckNoLeader looks whether no connected node leads. If no node is connected
// it looks at all that run.
func (h *Harness) CheckNoLeader() {
	h.t.Helper()
	nodes := h.connectedNodes()
	if len(nodes) == 0 {
		for i, node := range h.nodes {
			if node.running {
				nodes = append(nodes, i)
			}
		}
	}
	if leader, term, found := h.leader(nodes); found {
		h.t.Fatalf("node %d leads in term %d; want no leader", leader, term)
	}
}

// CheckCommitted waits until every connected node has applied cmd, and returns
// how many have and its index. It fails if none has in the end; see
// CheckCommittedN for a cluster where some can't.
func (h *Harness) CheckCommitted(cmd []byte) (count int, index Index) {
	h.t.Helper()
	h.eventually(func() bool {
		count, index = h.committed(cmd)
		return count == len(h.connectedNodes())
	})
	if count == 0 {
		h.t.Errorf("command %.40q was not committed within %v:%s", cmd, h.patience, h.describe())
	}
	return count, index
}

// CheckCommittedN waits until exactly n connected nodes have applied cmd.
func (h *Harness) CheckCommittedN(cmd []byte, n int) {
	h.t.Helper()
	count := 0
	if !h.eventually(func() bool {
		count, _ = h.committed(cmd)
		return count >= n
	}) || count != n {
		h.t.Errorf("command %.40q is committed on %d connected nodes, want %d:%s", cmd, count, n, h.describe())
	}
}

// committed counts the connected nodes that have applied cmd.
func (h *Harness) committed(cmd []byte) (count int, index Index) {
	h.t.Helper()
	for _, i := range h.connectedNodes() {
		at, ok := h.nodes[i].machine.find(cmd)
		if !ok {
			continue
		}
		if count > 0 && at != index {
			h.t.Errorf("command %.40q is at index %d on node %d and at %d elsewhere", cmd, at, i, index)
		}
		count, index = count+1, at
	}
	return count, index
}

// CheckNotCommitted looks whether no node has ever applied cmd.
func (h *Harness) CheckNotCommitted(cmd []byte) {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, e := range h.applied {
		if bytes.Equal(e.Data, cmd) {
			h.t.Errorf("command %.40q was committed at index %d; want it not to be", cmd, i)
		}
	}
}

// CheckLogsMatch waits until the logs of all connected nodes end at the same
// entry and have it applied, and then compares every entry of them.
func (h *Harness) CheckLogsMatch() {
	h.t.Helper()
	if !h.eventually(func() bool {
		var first *Status
		for _, i := range h.connectedNodes() {
			st := h.nodes[i].server.Status()
			if first == nil {
				first = &st
			}
			if st.Last != first.Last || st.Commit != st.Last || st.Applied != st.Last {
				return false
			}
		}
		return true
	}) {
		h.t.Errorf("logs did not become alike within %v:%s", h.patience, h.describe())
		return
	}
	var want Entries
	for k, i := range h.connectedNodes() {
		e, err := h.nodes[i].server.wholeLog()
		if err != nil {
			h.t.Errorf("read the log of node %d: %v", i, err)
			return
		}
		if k == 0 {
			want = e
			continue
		}
		for at := max(e.First(), want.First()); at <= min(e.Last(), want.Last()); at++ {
			if a, b := e.raw(int(at-e.First())), want.raw(int(at-want.First())); !bytes.Equal(a, b) {
				h.t.Errorf("entry %d differs: node %d has %v, node %d has %v", at, h.connectedNodes()[0],
					want.entry(int(at-want.First())), i, e.entry(int(at-e.First())))
				return
			}
		}
	}
}

// wholeLog returns everything that is committed and not compacted.
func (s *Server) wholeLog() (Entries, error) {
	cm := s.cm
	cm.mu.Lock()
	lo, hi := cm.core.log.start.Index+1, min(cm.core.commitIndex, cm.core.durableIndex)
	alive := cm.core.role != Dead
	if alive {
		cm.goroutines.add() // this one counts as the node's, because it may close the disk
		defer cm.goroutines.leave()
		cm.diskUsers.add()
		defer cm.leaveDisk()
	}
	cm.unlock()
	if !alive {
		return Entries{}, ErrStopped
	}
	var all []byte
	for next := lo; next <= hi; {
		runs, err := s.storage.Read(next, hi, 1<<20)
		if err != nil {
			return Entries{}, err
		}
		for _, e := range runs {
			all = append(all, e.Encoded()...)
			next = e.Last() + 1
		}
	}
	return ParseEntries(lo, all)
}

// describe says where every node stands, for failures.
func (h *Harness) describe() string {
	var b strings.Builder
	for i, node := range h.nodes {
		if node.server == nil {
			continue
		}
		st := node.server.Status()
		state := ""
		switch {
		case !node.running:
			state = " (crashed)"
		case node.disconnected:
			state = " (disconnected)"
		}
		fmt.Fprintf(&b, "\n  node %d%s: %v, term %d, leader %q, log %d to %d, commit %d, applied %d",
			i, state, st.Role, st.Term, st.Leader, st.First, st.Last, st.Commit, st.Applied)
		if len(st.Missing) > 0 {
			fmt.Fprintf(&b, ", forming without %v", st.Missing)
		}
		if st.Err != nil {
			fmt.Fprintf(&b, ", %v", st.Err)
		}
	}
	return b.String()
}
