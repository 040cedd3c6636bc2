package raft

import (
	"context"
	"net/rpc"
	"testing"
	"time"
)

// Whatever a step stages is flushed, also if the step came from an append that
// is refused at once, so that its connection's loop has no reply to wait for.
// An old leader's append did that to the new leader: the step took proposals,
// nobody wrote them to the leader's own disk, and no more were taken. (Found by cutting a forming
// cluster's connections; the proposal hung for ever.)
func TestStaleAppendDoesNotStrandProposals(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		s := h.Server(leader)
		if _, err := s.Propose(t.Context(), cmd(1)); err != nil {
			t.Fatal(err)
		}
		conn := impostor(t, h, other(h, leader, 1), leader, channelAppend)
		client := newRPCClient(newClientCodec(conn, maxWireVersion, s.codecLimits(channelAppend)))
		defer client.Close()
		s.cm.mu.Lock()
		old := s.cm.core.configuration.byName(h.Server(other(h, leader, 1)).conf.ID).id
		s.cm.mu.Unlock()
		p := &Proposal{done: make(chan struct{})}
		if err := s.cm.queue.add(entryCommand, nil, cmd(2), p, false); err != nil { // queued, and nobody has stepped yet
			t.Fatal(err)
		}
		done := make(chan *rpc.Call, 1)
		client.Go(methodAppendEntries, &call[appendArgs]{V: appendArgs{Leader: old, Seq: 1}}, &call[appendReply]{}, done)
		client.Flush()
		if c := <-done; c.Error != nil {
			t.Fatal(c.Error)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := p.Wait(ctx); err != nil { // two followers are a majority
			t.Error(err)
		}
		if _, err := s.Propose(ctx, cmd(3)); err != nil { // the leader's own disk has to be idle for this
			t.Error(err)
		}
	})
}
