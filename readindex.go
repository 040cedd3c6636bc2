package raft

// This file answers linearizable reads without the log: §8, thesis 6.4. A leader
// notes its commit index, makes sure that it still leads by hearing from a
// majority, and answers with that index. Whoever asked reads its state machine
// once that has applied so much. Reads that come while a round is under way
// wait for the next one, and share it.

// reads are those that a leader was asked for. A token says whom to answer.
type reads struct {
	waiting []readRequest // for the next round
	asked   []readRequest // of the round that is under way
	index   Index         // the commit index when it began
	round   uint64        // its number; replies to what was sent in an earlier one confirm nothing
	heard   []memberID    // scratch
}

type readRequest struct {
	from  memberID
	token any
}

// readAnswer ends a read: by its index, or, without ok, because this server
// does not lead.
type readAnswer struct {
	token any
	index Index
	ok    bool
}

// readIndex asks for the index of a read that `from` makes.
func (c *core) readIndex(from memberID, token any) {
	c.reads.waiting = append(c.reads.waiting, readRequest{from, token})
}

// takesReads tells whether a read that comes now need not wait for the end of
// a round that has begun, or for the next one.
func (c *core) takesReads() bool { return len(c.reads.asked)+len(c.reads.waiting) == 0 }

// continueReads begins a round for reads that wait, or refuses all if this
// server does not lead. A new leader's commit index may be behind what its
// predecessor has acknowledged, until it has committed an entry of its own: §8.
func (c *core) continueReads() {
	r := &c.reads
	if c.role != Leader {
		for _, q := range append(r.asked, r.waiting...) {
			c.out.answers = append(c.out.answers, readAnswer{token: q.token})
		}
		r.asked, r.waiting = nil, nil
		return
	}
	for len(r.asked) == 0 && len(r.waiting) > 0 && c.commitIndex >= c.firstOfTerm {
		r.asked, r.waiting = r.waiting, nil
		r.index = c.commitIndex
		r.round++
		for _, p := range c.progress {
			if c.configuration.voter(p.id) {
				c.sendHeartbeat(p)
			}
		}
		c.confirmReads() // a single voter needs nobody
	}
}

// confirmReads answers the reads of the round under way once a majority has
// answered something that was sent after it began.
func (c *core) confirmReads() {
	r := &c.reads
	if len(r.asked) == 0 {
		return
	}
	r.heard = append(r.heard[:0], c.self)
	for _, p := range c.progress {
		if p.round == r.round {
			r.heard = append(r.heard, p.id)
		}
	}
	if !c.configuration.quorum(r.heard) {
		return
	}
	for _, q := range r.asked {
		c.out.answers = append(c.out.answers, readAnswer{q.token, r.index, true})
		c.onForward(q.from, r.index) // somebody waits there to see it applied
	}
	r.asked = nil
}
