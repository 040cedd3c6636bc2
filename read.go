package raft

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
)

// This file is the user's side of linearizable reads (readindex.go). All reads
// that come while none of them can be helped share one sharedRead, and a step
// takes it when it can: on a leader to the core, on a follower to the leader.
// Joining one needs no lock, and its answer wakes all at once.

// sharedRead is reads that are answered together. Whoever waits has loaded it
// from the queue before a step took it, so what the step asks is asked after
// every one of these reads began.
type sharedRead struct {
	appliedWait // its index is set by the answer
	cm          *ConsensusModule
	lease       bool        // a lease will do
	wanted      atomic.Bool // somebody waits
	ok          bool        // false: ask again, this node or that leader could not tell
}

// answer is called with the module's lock held, once. Who reads is told when
// the entry is applied here.
func (r *sharedRead) answer(a readAnswer) {
	if !a.ok {
		close(r.done)
		return
	}
	r.ok, r.index = true, a.index
	r.cm.pending.wait(&r.appliedWait)
	r.cm.core.want(a.index)
}

// readAnswerer is what readRequest.token holds.
type readAnswerer interface{ answer(a readAnswer) }

// kindsOfRead are ReadIndex and ReadLease.
const kindsOfRead = 2

func readKind(lease bool) int {
	if lease {
		return 1
	}
	return 0
}

// readQueue is the reads that no step has taken yet.
type readQueue struct {
	next [kindsOfRead]atomic.Pointer[sharedRead]
	open [kindsOfRead]atomic.Bool // a step would take them; set with the module's lock held

	// Taken by this node while it did not lead, and not answered. One request
	// to the leader is under way at a time. Guarded by the module's lock.
	asked []*sharedRead
}

func (q *readQueue) init(cm *ConsensusModule) {
	for kind := range q.next {
		q.renew(cm, kind)
	}
}

func (q *readQueue) renew(cm *ConsensusModule, kind int) *sharedRead {
	r := &sharedRead{appliedWait: appliedWait{done: make(chan struct{})}, cm: cm, lease: kind == readKind(true)}
	return q.next[kind].Swap(r)
}

// join returns the round that a read belongs to, and whether it is the first:
// then a step must be tried. If none takes the round now, the one that lets
// reads in again looks for it.
func (q *readQueue) join(lease bool) (r *sharedRead, first bool) {
	r = q.next[readKind(lease)].Load()
	first = !r.wanted.Load() // often: a store would cost the other readers a cache miss
	if first {
		r.wanted.Store(true)
	}
	return r, first
}

// ready tells whether a step would take reads.
func (q *readQueue) ready() bool {
	for kind := range q.next {
		if q.open[kind].Load() && q.next[kind].Load().wanted.Load() {
			return true
		}
	}
	return false
}

func (q *readQueue) openFor(open [kindsOfRead]bool) {
	for kind := range open {
		if q.open[kind].Load() != open[kind] {
			q.open[kind].Store(open[kind])
		}
	}
}

// readsOpen says which reads a step takes: by index if they need not wait for
// the end of a round, by lease also if there is one.
func (cm *ConsensusModule) readsOpen() (open [kindsOfRead]bool) {
	c := cm.core
	var index, lease bool
	switch {
	case c.role == Leader:
		index = c.takesReads()
		lease = index || c.holdsLease()
	case c.role != Dead && c.leader != 0:
		index = len(cm.reads.asked) == 0
		lease = index
	}
	open[readKind(false)], open[readKind(true)] = index, lease
	return open
}

// takeReads gives the reads that wait to the core if it leads, or asks the
// leader. The module's lock is held.
func (cm *ConsensusModule) takeReads() {
	q := &cm.reads
	var taken []*sharedRead
	lease := true // will do for all
	for kind, open := range cm.readsOpen() {
		if open && q.next[kind].Load().wanted.Load() {
			taken = append(taken, q.renew(cm, kind))
			lease = lease && kind == readKind(true)
		}
	}
	c := cm.core
	switch {
	case len(taken) == 0:
	case c.role == Leader:
		cm.lookAtClock() // a read may have begun since this step did: a lease must hold after that
		for _, r := range taken {
			c.read(c.self, r.lease, r)
		}
	default:
		q.asked = taken
		if !cm.transport.ask(c.leader, lease) {
			cm.readsAnswered(&readReply{Refused: true}, nil)
		}
	}
}

// readsAnswered takes the leader's answer, or none. The module's lock is held.
func (cm *ConsensusModule) readsAnswered(r *readReply, err error) {
	a := readAnswer{index: r.Index, ok: err == nil && !r.Refused}
	for _, round := range cm.reads.asked {
		round.answer(a)
	}
	cm.reads.asked = nil
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
// ErrNoLeader (with ctx's) if no leader answered in time, or is one of WaitApplied.
func (s *Server) ReadIndex(ctx context.Context) (Index, error) { return s.linearize(ctx, false) }

func (s *Server) linearize(ctx context.Context, lease bool) (Index, error) {
	h := s.conf.history
	floor := Index(0)
	if h != nil {
		floor = h.readBegins()
	}
	for {
		index, ok, err := s.askReadIndex(ctx, lease)
		if ok && err == nil && h != nil {
			h.readAllowed(s.conf.ID, floor, index)
		}
		if ok || err != nil {
			return index, err
		}
		s.pauseFor(ctx)
	}
}

// askReadIndex waits for the answer of one round. It returns false if it is
// worth asking again.
func (s *Server) askReadIndex(ctx context.Context, lease bool) (_ Index, ok bool, _ error) {
	cm := s.cm
	r, first := cm.reads.join(lease)
	if first {
		if lease {
			// The step answers at once if there is a lease. Those who are about to
			// read too should be in it, and not each take a step of its own.
			runtime.Gosched()
		}
		cm.tryStep()
	}
	select {
	case <-r.done:
		return r.index, r.ok, r.err
	case <-ctx.Done():
	case <-cm.done:
	}
	if isClosed(cm.done) {
		return 0, false, ErrStopped
	}
	cm.mu.Lock()
	answered := r.ok
	cm.unlock()
	if answered { // and not applied here yet
		return 0, false, ctx.Err()
	}
	return 0, false, s.untaken(ctx.Err())
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
