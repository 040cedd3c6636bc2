package raft

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// This file is the user's side of linearizable reads (readindex.go): on a
// leader they go to the core, on a follower to the leader, many at once.

// readWait is one ReadIndex call that waits.
type readWait struct {
	lease bool // a lease will do
	done  chan struct{}
	index Index
	ok    bool // false: ask again, this node or that leader could not tell
}

// answer is called with the module's lock held, once.
func (w *readWait) answer(a readAnswer) {
	w.index, w.ok = a.index, a.ok
	close(w.done)
}

// readAnswerer is what readRequest.token holds.
type readAnswerer interface{ answer(a readAnswer) }

// remoteReads are the reads of a node that does not lead. One request to the
// leader is under way at a time; what comes meanwhile shares the next one.
type remoteReads struct {
	to      memberID // the leader that was asked
	asked   []*readWait
	waiting []*readWait
}

func (r *remoteReads) answer(a readAnswer) {
	for _, w := range r.asked {
		w.answer(a)
	}
	r.asked = nil
}

// ReadLease is ReadIndex, but a leader that holds a lease answers by its clock and
// asks nobody, so that a read on the leader waits for no message, and one on
// another node for one answer of the leader's. Without a lease, because
// Config.LeaseDuration is zero on the leader, or for the moment, it does what
// ReadIndex does.
//
// It is linearizable only as long as the rates of the nodes' clocks differ by at
// most Config.MaxClockDriftPercent; ReadIndex needs no clock at all. What counts
// is the moment at which the leader looks at its clock, which is during the
// call: whether the lease has ended when the caller gets to see the state makes
// no difference.
func (s *Server) ReadLease(ctx context.Context) (Index, error) { return s.linearize(ctx, true) }

// ReadIndex returns once this node's state machine includes every write that
// was acknowledged, by any node, before the call: reading the state machine is
// linearizable then (thesis 6.4). Any node takes reads: one that does not lead
// asks the leader. A read writes nothing to any disk. The result is the index
// as of which the state was read, or a later one. The error is ctx's, matches
// ErrNoLeader (with ctx's) if no leader could be asked, or ErrStopped.
func (s *Server) ReadIndex(ctx context.Context) (Index, error) { return s.linearize(ctx, false) }

func (s *Server) linearize(ctx context.Context, lease bool) (Index, error) {
	h := s.conf.history
	floor := Index(0)
	if h != nil {
		floor = h.readBegins()
	}
	for {
		index, ok, err := s.askReadIndex(ctx, lease)
		if ok {
			err = s.WaitApplied(ctx, index)
		}
		if ok && err == nil && h != nil {
			h.readAllowed(s.conf.ID, floor, index)
		}
		if ok || err != nil {
			return index, err
		}
	}
}

// askReadIndex asks once, when there is somebody to ask. It returns false if it
// is worth asking again.
func (s *Server) askReadIndex(ctx context.Context, lease bool) (Index, bool, error) {
	cm := s.cm
	w := &readWait{lease: lease, done: make(chan struct{})}
	var done <-chan struct{} // nil: nobody was asked
	cm.mu.Lock()
	changed := cm.changed
	switch c := cm.core; {
	case c.role == Leader:
		done = w.done
		cm.transition(func(c *core) { c.read(c.self, lease, w) })
	case c.leader != 0:
		done = w.done
		s.remote.waiting = append(s.remote.waiting, w)
		s.sendReads()
	}
	cm.unlock()
	if done != nil {
		changed = nil // whoever ends to lead refuses what it was asked
	}
	select {
	case <-done:
		if w.ok {
			return w.index, true, nil
		}
		s.pauseFor(ctx)
	case <-changed:
	case <-ctx.Done():
	case <-cm.done:
	}
	switch {
	case isClosed(cm.done):
		return 0, false, ErrStopped
	case ctx.Err() != nil:
		return 0, false, fmt.Errorf("%w: %w", ErrNoLeader, ctx.Err())
	}
	return 0, false, nil
}

// pauseFor waits before a read that was refused is asked for again.
func (s *Server) pauseFor(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.conf.HeartbeatInterval)
	defer cancel()
	select {
	case <-ctx.Done():
	case <-s.cm.done:
	}
}

// sendReads asks the leader for the reads that wait, unless it is being asked.
// The module's lock is held.
func (s *Server) sendReads() {
	r := &s.remote
	if len(r.asked) > 0 || len(r.waiting) == 0 {
		return
	}
	r.asked, r.waiting = r.waiting, nil
	r.to = s.cm.core.leader
	l := s.link(r.to, channelRead)
	needsRound := slices.ContainsFunc(r.asked, func(w *readWait) bool { return !w.lease })
	if l == nil || !l.push(outgoing{ask: &readArgs{Lease: !needsRound}}) {
		r.answer(readAnswer{})
	}
}

// readsAnswered takes the leader's answer, or none. The module's lock is held.
func (s *Server) readsAnswered(r *readReply, err error) {
	s.remote.answer(readAnswer{index: r.Index, ok: err == nil && !r.Refused})
	if s.cm.core.leader != 0 && s.cm.core.role != Leader {
		s.sendReads()
	} else {
		s.remote.asked, s.remote.waiting = s.remote.waiting, nil
		s.remote.answer(readAnswer{})
	}
}

// readArgs asks the leader for the index of a read.
type readArgs struct {
	From  memberID
	Lease bool // a lease will do
}

type readReply struct {
	Refused bool // the node does not lead
	Index   Index
}

// answer is called with the module's lock held, when the leader knows.
func (t ticket) answer(a readAnswer) {
	t.conn.codec.WriteDeferred(t.seq, &readReply{Refused: !a.ok, Index: a.index})
	t.conn.open.Add(-1)
	wake(t.conn.ready)
}

var errReadChannel = errors.New("raft: reads come on a connection of their own, where a round of heartbeats may be waited for")

// ReadIndex answers a follower's reads.
func (v *service) ReadIndex(args *call[readArgs], reply *call[readReply]) error {
	if v.conn.channel != channelRead {
		return errReadChannel
	}
	reply.deferred = true
	var err error
	v.conn.server.cm.step(func(c *core) {
		if err = v.checkSender(c, args.V.From); err == nil {
			v.conn.open.Add(1)
			c.read(args.V.From, args.V.Lease, ticket{v.conn, args.req.seq})
		}
	})
	return err
}
