package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"example.com/raft"
)

const (
	founderCount  = 3
	maxNodes      = 7                // in this process
	actionTimeout = 20 * time.Second // of a change of the membership, a transfer, a snapshot
)

var (
	errBusy     = errors.New("another change of the membership is running: wait for it, then try again")
	errNoLeader = errors.New("no node leads, and only a leader can do this: wait for an election, or bring a majority back")
	errFull     = fmt.Errorf("this process runs at most %d nodes: remove one, or add one again that was removed", maxNodes)
)

// leading returns the leader. A node that was cut off may think for a second
// that it leads; the one of the highest term does.
func (c *Cluster) leading() (*raft.Server, error) {
	var leader *raft.Server
	var term raft.Term
	for _, n := range c.Nodes() {
		server, _, running := n.current()
		if !running {
			continue
		}
		if st := server.Status(); st.Role == raft.Leader && st.Term > term {
			leader, term = server, st.Term
		}
	}
	if leader == nil {
		return nil, errNoLeader
	}
	return leader, nil
}

// change runs one change of the membership on the leader. It is bounded by
// a timeout and not by a request: a client that hangs up must not leave half
// of it.
func (c *Cluster) change(do func(ctx context.Context, leader *raft.Server) error) error {
	if !c.changing.TryLock() {
		return errBusy
	}
	defer c.changing.Unlock()
	ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
	defer cancel()
	if ctx.Err() != nil {
		return raft.ErrStopped
	}
	leader, err := c.leading()
	if err != nil {
		return err
	}
	return do(ctx, leader)
}

// AddNode runs one more node, with an empty directory, and makes it a member.
// If the leader refuses it, it is as if it had never been.
func (c *Cluster) AddNode(learner bool) (n *Node, err error) {
	err = c.change(func(ctx context.Context, leader *raft.Server) error {
		if n = c.unusedNode(); n == nil {
			return errFull
		}
		if err := n.Start(ctx); err != nil {
			return errors.Join(err, os.RemoveAll(n.Dir))
		}
		c.insert(n)
		err := addMember(ctx, leader, n, learner)
		var refused *raft.MembershipError
		if errors.As(err, &refused) && refused.Reason != raft.MembershipReplaced || errors.Is(err, raft.ErrSuperseded) {
			c.forget(n)
			err = errors.Join(err, n.Kill(), os.RemoveAll(n.Dir))
		}
		return err
	})
	return n, err
}

// unusedNode returns the first node that this process may run and does not, nil
// if there is none.
func (c *Cluster) unusedNode() *Node {
	for i := range maxNodes {
		if n := c.newNode(i); c.node(string(n.ID)) == nil {
			return n
		}
	}
	return nil
}

func (c *Cluster) insert(n *Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := 0
	for i < len(c.nodes) && c.nodes[i].ID < n.ID {
		i++
	}
	c.nodes = append(c.nodes[:i:i], append([]*Node{n}, c.nodes[i:]...)...)
}

func (c *Cluster) forget(n *Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, other := range c.nodes {
		if other == n {
			c.nodes = append(c.nodes[:i:i], c.nodes[i+1:]...)
			return
		}
	}
}

// Add makes a node of this process a voter or a learner. It promotes a learner;
// one that was removed starts again, with an empty directory.
func (c *Cluster) Add(n *Node, learner bool) error {
	return c.change(func(ctx context.Context, leader *raft.Server) error {
		if err := n.join(ctx); err != nil && !errors.Is(err, errRunning) {
			return err
		}
		return addMember(ctx, leader, n, learner)
	})
}

func addMember(ctx context.Context, leader *raft.Server, n *Node, learner bool) error {
	add, as := leader.AddVoter, "a voter"
	if learner {
		add, as = leader.AddLearner, "a learner"
	}
	n.Feed.acted(n.ID, "is to be "+as)
	return add(ctx, raft.Member{ID: n.ID, Addr: n.Addr})
}

// join starts the node as one that belongs to no cluster, or to the one that
// its directory knows.
func (n *Node) join(ctx context.Context) error {
	n.mu.Lock()
	if n.removed {
		// Its directory was put aside when it was no member any more. Nobody
		// counts on what is in there.
		if err := os.RemoveAll(n.asideDir()); err != nil {
			n.mu.Unlock()
			return fmt.Errorf("removing the old data of node %s: %w", n.ID, err)
		}
		n.removed = false
		n.SetPartitioned(false)
	}
	n.Members = nil // who founded the cluster is history
	n.mu.Unlock()
	return n.Start(ctx)
}

// Remove takes a node out of the cluster, stops it, and puts its directory
// aside, so that it is not started again with what it had.
func (c *Cluster) Remove(n *Node) error {
	return c.change(func(ctx context.Context, leader *raft.Server) error {
		n.Feed.acted(n.ID, "is to be removed")
		if err := leader.Remove(ctx, n.ID); err != nil {
			return err
		}
		err := n.retire()
		n.Feed.acted(n.ID, "is removed and stopped")
		return err
	})
}

// retire is for a node that is certainly no member any more.
func (n *Node) retire() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running {
		if err := n.killLocked(); err != nil {
			return err
		}
	}
	if err := errors.Join(os.RemoveAll(n.asideDir()), os.Rename(n.Dir, n.asideDir())); err != nil {
		return fmt.Errorf("node %s is removed and stopped, but its directory could not be put aside: %w", n.ID, err)
	}
	n.removed = true
	return nil
}

// asideDir is where the directory of a removed node is. It tells the next run
// of this program that the node was removed.
func (n *Node) asideDir() string { return n.Dir + ".removed" }

// Lead hands the leadership to a node.
func (c *Cluster) Lead(n *Node) error {
	ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
	defer cancel()
	leader, err := c.leading()
	if err != nil {
		return err
	}
	if err = leader.TransferLeadership(ctx, n.ID); errors.Is(err, raft.ErrStopped) {
		err = fmt.Errorf("%w: the leader was stopped while it handed over", raft.ErrOutcomeUnknown)
	}
	return err
}

// TakeSnapshot makes a node store a snapshot, and returns up to which entry.
func (c *Cluster) TakeSnapshot(n *Node) (raft.Index, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
	defer cancel()
	server, _, running := n.current()
	if !running {
		return 0, errStopped
	}
	err := server.TakeSnapshot(ctx)
	return server.Status().Snapshot, err
}
