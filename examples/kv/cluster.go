package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"example.com/raft"
)

const (
	clusterID      = "kv"
	requestTimeout = 5 * time.Second // outlasts an election
)

// Node is one member of the cluster: the Raft server with its state machine,
// and the HTTP server in front of it. It can be stopped and started again.
type Node struct {
	ID      raft.NodeID
	Dir     string
	Members []raft.Member // all founders, this node included
	Listen  string        // Raft's host:port; port 0 becomes a free one in listen, and stays
	HTTP    string        // likewise for clients
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
	goroutines sync.WaitGroup
}

var (
	errRunning = errors.New("the node is running")
	errStopped = errors.New("the node is not running")
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
	server, err := raft.Start(ctx, raft.Config{
		ID: n.ID, ClusterID: clusterID, StateMachine: store, Dir: n.Dir, Bootstrap: n.Members,
		Listener: &gatedListener{n.raftL, n.gate}, DialContext: n.gate.dial,
		MaxCommandBytes: maxCommandBytes, Logger: n.Logger,
	})
	if err == nil {
		if err = sameMembers(n.Dir, n.Members, server.Status().Members); err != nil {
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

// sameMembers refuses addresses that the directory's cluster does not know:
// its other members would never find this node. A node that has not formed a
// cluster yet has no members.
func sameMembers(dir string, want, have []raft.Member) error {
	addrs := map[raft.NodeID]string{}
	for _, m := range want {
		addrs[m.ID] = m.Addr
	}
	for _, m := range have {
		if addrs[m.ID] != m.Addr {
			return fmt.Errorf("%s belongs to a cluster in which node %s is at %s, not at %q: start it with the same ports as before, or with another directory", dir, m.ID, m.Addr, addrs[m.ID])
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

// propose is Server.Propose of whatever server runs now.
func (n *Node) propose(ctx context.Context, cmd []byte) (raft.Result, error) {
	server, _, running := n.current()
	if !running {
		return raft.Result{}, fmt.Errorf("node %s: %w", n.ID, raft.ErrStopped)
	}
	return server.Propose(ctx, cmd)
}

// Cluster is all nodes of this process.
type Cluster struct {
	Nodes []*Node
	Feed  *Feed
}

// newCluster prepares nodes a, b and c with directories below dir. ports are
// the first of their HTTP ports and the first of their Raft ports; 0: free ones.
func newCluster(dir string, httpPort, raftPort int, logger *slog.Logger) (*Cluster, error) {
	c := &Cluster{Feed: newFeed()}
	port := func(first, i int) string {
		if first == 0 {
			return "127.0.0.1:0"
		}
		return fmt.Sprintf("127.0.0.1:%d", first+i)
	}
	var members []raft.Member
	for i, id := range []raft.NodeID{"a", "b", "c"} {
		n := &Node{
			ID: id, Dir: filepath.Join(dir, string(id)), Listen: port(raftPort, i), HTTP: port(httpPort, i),
			Timeout: requestTimeout, Logger: logger, Feed: c.Feed, gate: newGate(),
		}
		n.Handler = func(n *Node) http.Handler { return newPage(c.Nodes, c.Feed, n, true) }
		c.Nodes = append(c.Nodes, n)
		if err := n.listen(); err != nil {
			c.Stop()
			return nil, err
		}
		members = append(members, raft.Member{ID: id, Addr: n.Listen})
	}
	for _, n := range c.Nodes {
		n.Members = members
	}
	return c, nil
}

// Start starts all nodes, or none.
func (c *Cluster) Start(ctx context.Context) error {
	for _, n := range c.Nodes {
		if err := n.Start(ctx); err != nil {
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
	wins := make(chan won, len(c.Nodes))
	for _, n := range c.Nodes {
		server, _, _ := n.current()
		go func() {
			_, term, err := server.WaitLeadership(ctx)
			wins <- won{n, term, err}
		}()
	}
	var first won
	for range c.Nodes { // all, so that no goroutine is left
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
// leadership to.
func (c *Cluster) Stop() error {
	errs := make([]error, len(c.Nodes))
	var all sync.WaitGroup
	for i, n := range c.Nodes {
		all.Go(func() { errs[i] = n.Stop(false) })
	}
	all.Wait()
	return errors.Join(errs...)
}
