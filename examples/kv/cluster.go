package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"example.com/raft"
)

const (
	clusterID      = "kv"
	requestTimeout = 5 * time.Second // outlasts an election
	leaseDuration  = time.Second     // the longest that Raft's default timing allows

	// Snapshots that a service takes once in 64 MiB would never be seen here:
	// this takes them often, and keeps of the log about what the page shows of
	// it, so that a node that is added is sent a snapshot, slowly enough to look
	// at. A service leaves all three at their defaults.
	snapshotEvery     = 1 << 20
	keepLog           = 1 << 10
	snapshotPerSecond = 4 << 20
)

// Node is one member of the cluster: the Raft server with its state machine,
// and the HTTP server in front of it. It can be stopped and started again.
type Node struct {
	ID      raft.NodeID
	Dir     string
	Members []raft.Member // all founders, this node included; none for a node that is added later
	Addr    string        // where the others reach it; "" until listen: the same as Listen
	Listen  string        // Raft's host:port; port 0 becomes a free one in listen, and stays
	HTTP    string        // likewise for clients
	Leases  bool          // while this node leads, it answers reads by lease
	Timeout time.Duration // of a request
	Logger  *slog.Logger
	Feed    *Feed
	Handler func(n *Node) http.Handler // made anew at each start

	gate *gate

	mu         sync.Mutex
	raftL      net.Listener // between listen and Start
	httpL      net.Listener
	server     *raft.Server // the current one, or the last one when stopped
	store      *Store
	http       *http.Server
	running    bool
	removed    bool // it is no member any more, and its directory is put aside
	goroutines sync.WaitGroup
}

var (
	errRunning = errors.New("the node is running")
	errStopped = errors.New("the node is not running")
	errRemoved = errors.New("the node was removed from the cluster: add it again, as a voter or as a learner")
)

// listen opens both ports and settles their numbers.
func (n *Node) listen() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.listenLocked()
}

func (n *Node) listenLocked() (err error) {
	if n.raftL != nil {
		return nil
	}
	if n.raftL, err = net.Listen("tcp", n.Listen); err != nil {
		return fmt.Errorf("node %s can't listen for its peers: %w\nIs another copy running? Stop it, or use other ports", n.ID, err)
	}
	if n.httpL, err = net.Listen("tcp", n.HTTP); err != nil {
		n.closeListeners()
		return fmt.Errorf("node %s can't listen for clients: %w\nIs another copy running? Stop it, or use other ports", n.ID, err)
	}
	n.Listen, n.HTTP = n.raftL.Addr().String(), n.httpL.Addr().String()
	n.Addr = cmp.Or(n.Addr, n.Listen)
	return nil
}

func (n *Node) closeListeners() {
	for _, l := range []net.Listener{n.raftL, n.httpL} {
		if l != nil {
			l.Close()
		}
	}
	n.raftL, n.httpL = nil, nil
}

// Start runs the node on its directory. It returns once both ports answer.
func (n *Node) Start(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.removed {
		return errRemoved
	}
	if n.running {
		if n.server.Err() == nil {
			return errRunning
		}
		n.killLocked() // it failed by itself; what is left of it goes first
	}
	if err := n.listenLocked(); err != nil {
		return err
	}
	store := newStore()
	promised := time.Duration(0)
	if n.Leases {
		promised = leaseDuration
	}
	server, err := raft.Start(ctx, raft.Config{
		ID: n.ID, ClusterID: clusterID, StateMachine: store, Dir: n.Dir, Bootstrap: n.Members,
		Listener: &gatedListener{n.raftL, n.gate}, DialContext: n.gate.dial,
		MaxCommandBytes: maxCommandBytes, Logger: n.Logger, LeaseDuration: promised,
		SnapshotEveryBytes: snapshotEvery, KeepLogBytes: keepLog, MaxSnapshotBytesPerSecond: snapshotPerSecond,
	})
	if err == nil {
		if err = n.sameAddress(server.Status().Members); err != nil {
			server.Close()
		}
	}
	if err != nil {
		n.closeListeners()
		return fmt.Errorf("node %s: %w", n.ID, err)
	}
	n.server, n.store, n.running = server, store, true
	n.http = newHTTPServer(n.Handler(n))
	httpServer, httpL := n.http, n.httpL
	n.raftL, n.httpL = nil, nil
	n.goroutines.Go(func() { httpServer.Serve(httpL) })
	n.goroutines.Go(func() { n.Feed.follow(n.ID, server) })
	return nil
}

// sameAddress refuses to run at another address than the one that the members
// of the directory's cluster know: they would never find this node. A node that
// belongs to no cluster yet has no members.
func (n *Node) sameAddress(members []raft.Member) error {
	for _, m := range members {
		if m.ID == n.ID && m.Addr != n.Addr {
			return fmt.Errorf("%s belongs to a cluster in which node %s is at %s, not at %s: start it with the same ports as before, or with another directory", n.Dir, m.ID, m.Addr, n.Addr)
		}
	}
	return nil
}

// Kill stops the node at once and hands nothing over: its clients' connections
// break, and the others find out by its silence.
func (n *Node) Kill() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.running {
		return errStopped
	}
	return n.killLocked()
}

func (n *Node) killLocked() error {
	n.http.Close()
	err := n.server.Close()
	n.running = false
	n.goroutines.Wait()
	return err
}

// Stop stops the node in good order: requests that run are answered, and with
// handOver the leadership passes to another node first.
func (n *Node) Stop(handOver bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.running {
		n.closeListeners()
		return nil
	}
	stop := n.server.Close
	if handOver {
		stop = func() error { return n.server.Shutdown(context.Background()) }
	}
	err := stop()
	closeHTTP(n.http)
	n.running = false
	n.goroutines.Wait()
	return err
}

// closeHTTP gives running requests a moment to be answered.
func closeHTTP(s *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), 250*time.Millisecond)
	defer cancel()
	s.Shutdown(ctx)
	s.Close()
}

// SetPartitioned cuts the node off from the others, or heals the cut. Its
// clients still reach it.
func (n *Node) SetPartitioned(cut bool) {
	n.gate.setCut(cut)
	n.Feed.partitioned(n.ID, cut)
}

// current returns the running server and its store, or the last ones.
func (n *Node) current() (server *raft.Server, store *Store, running bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.server, n.store, n.running
}

// serving returns what current does, or an error if the node does not run.
func (n *Node) serving() (*raft.Server, *Store, error) {
	server, store, running := n.current()
	if !running {
		return nil, nil, fmt.Errorf("node %s: %w", n.ID, raft.ErrStopped)
	}
	return server, store, nil
}

// propose is Server.ProposeOnce of whatever server runs now, or Server.Propose
// for a request of no session.
func (n *Node) propose(ctx context.Context, id raft.RequestID, cmd []byte) (raft.Result, error) {
	server, _, err := n.serving()
	if err != nil {
		return raft.Result{}, err
	}
	if id.Session == 0 {
		return server.Propose(ctx, cmd)
	}
	return server.ProposeOnce(ctx, id, cmd)
}

func (n *Node) openSession(ctx context.Context) (raft.SessionID, error) {
	server, _, err := n.serving()
	if err != nil {
		return 0, err
	}
	return server.OpenSession(ctx)
}

func (n *Node) closeSession(ctx context.Context, id raft.SessionID) error {
	server, _, err := n.serving()
	if err != nil {
		return err
	}
	return server.CloseSession(ctx, id)
}

// fresh returns what this node holds, when it holds what consistency demands.
// ended closes when the node has ended, after which nothing changes any more.
func (n *Node) fresh(ctx context.Context, consistency string) (s *Store, ended <-chan struct{}, err error) {
	server, store, err := n.serving()
	if err != nil {
		return nil, nil, err
	}
	switch consistency {
	case linearizable:
		_, err = server.ReadIndex(ctx)
	case lease:
		_, err = server.ReadLease(ctx)
	}
	return store, server.Done(), err
}

// Cluster is all nodes of this process.
type Cluster struct {
	Feed *Feed

	dir       string // the nodes' directories are below it
	firstPort int    // see ports; 0: any
	leases    bool
	logger    *slog.Logger

	mu    sync.Mutex
	nodes []*Node // by ID; those that were removed too

	changing sync.Mutex // one change of the membership at a time
	ctx      context.Context
	cancel   context.CancelFunc // ends what the page's buttons began
	timeout  time.Duration      // of each of that
}

// newCluster prepares the nodes whose directories are below dir, at least a, b
// and c, which found the cluster. firstPort is the first of their ports; 0: free
// ones.
func newCluster(dir string, firstPort int, leases bool, logger *slog.Logger) (*Cluster, error) {
	c := &Cluster{Feed: newFeed(), dir: dir, firstPort: firstPort, leases: leases, logger: logger, timeout: actionTimeout}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	var founders []raft.Member
	for i := range maxNodes {
		n := c.newNode(i)
		there, err := exists(n.Dir)
		if err == nil && !there {
			n.removed, err = exists(n.asideDir())
		}
		if err == nil && !there && !n.removed && i >= founderCount {
			continue
		}
		if err == nil && !n.removed {
			err = n.listen()
		}
		if err != nil {
			c.Stop()
			return nil, err
		}
		c.nodes = append(c.nodes, n)
		if i < founderCount {
			founders = append(founders, raft.Member{ID: n.ID, Addr: n.Addr})
		}
	}
	for _, n := range c.nodes[:founderCount] {
		if n.removed {
			return c, nil // the cluster was founded long ago
		}
	}
	for _, n := range c.nodes[:founderCount] {
		n.Members = founders
	}
	return c, nil
}

// newNode returns the i-th node that this process may run.
func (c *Cluster) newNode(i int) *Node {
	id := raft.NodeID(rune('a' + i))
	clients, peers := ports(c.firstPort, i)
	return &Node{
		ID: id, Dir: filepath.Join(c.dir, string(id)), Listen: peers, HTTP: clients, Leases: c.leases,
		Timeout: requestTimeout, Logger: c.logger, Feed: c.Feed, gate: newGate(),
		Handler: func(n *Node) http.Handler { return newPage(c, n, true) },
	}
}

// ports returns the addresses of the i-th node: the founders' client ports come
// first, then their Raft ports, then two for each node that is added.
func ports(first, i int) (clients, peers string) {
	h, r := first+i, first+founderCount+i
	switch {
	case first == 0:
		h, r = 0, 0
	case i >= founderCount:
		h = first + 2*i
		r = h + 1
	}
	return fmt.Sprintf("127.0.0.1:%d", h), fmt.Sprintf("127.0.0.1:%d", r)
}

func exists(path string) (bool, error) {
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Nodes returns all nodes, ordered by ID.
func (c *Cluster) Nodes() []*Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.nodes)
}

// node returns the node of that name, nil if there is none.
func (c *Cluster) node(id string) *Node {
	for _, n := range c.Nodes() {
		if string(n.ID) == id {
			return n
		}
	}
	return nil
}

// Start starts all nodes but those that were removed, or none.
func (c *Cluster) Start(ctx context.Context) error {
	for _, n := range c.Nodes() {
		if err := n.Start(ctx); err != nil && !errors.Is(err, errRemoved) {
			c.Stop()
			return err
		}
	}
	return nil
}

// WaitLeader returns once a node leads and has applied all that was committed
// before.
func (c *Cluster) WaitLeader(ctx context.Context) (*Node, raft.Term, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type won struct {
		node *Node
		term raft.Term
		err  error
	}
	wins, waiting := make(chan won), 0
	for _, n := range c.Nodes() {
		server, _, running := n.current()
		if !running {
			continue
		}
		waiting++
		go func() {
			_, term, err := server.WaitLeadership(ctx)
			wins <- won{n, term, err}
		}()
	}
	var first won
	for range waiting { // all, so that no goroutine is left
		w := <-wins
		if first.node == nil || first.err != nil && w.err == nil {
			first = w
		}
		if w.err == nil {
			cancel()
		}
	}
	return first.node, first.term, first.err
}

// Stop stops all nodes at once: with none left, there is nobody to hand the
// leadership to. A change of the membership that runs is given up first.
func (c *Cluster) Stop() error {
	c.cancel()
	c.changing.Lock()
	defer c.changing.Unlock()
	nodes := c.Nodes()
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() { errs[i] = n.Stop(false) })
	}
	all.Wait()
	return errors.Join(errs...)
}
