package raft

// Linearizable reads in the simulator: a read that is allowed must include every
// write that any client was told of before the read began (invariant 21).

// simReads counts what became of them.
type simReads struct {
	begun, allowed, refused int
	byLease                 int // of those allowed, at once and by a leader that has followers
	withheld                int // starts after which a promise is kept
	sleeps                  int // of machines
	shortened               int // a shorter promise is on disk than before
}

func (r *simReads) add(o simReads) {
	r.begun += o.begun
	r.allowed += o.allowed
	r.refused += o.refused
	r.byLease += o.byLease
	r.withheld += o.withheld
	r.sleeps += o.sleeps
	r.shortened += o.shortened
}

// simReadToken says when a read began, and on which run of a node.
type simReadToken struct {
	run   uint32
	floor Index
	lease bool // a lease would do, and there was one
}

// beginRead asks a node that leads, or believes so, for the index of a read in
// its own name or another member's.
func (s *sim) beginRead(n *simNode) {
	s.reads.begun++
	from := n.core.self
	if ps := n.core.progress; len(ps) > 0 && s.chance(0.5) {
		from = ps[s.rng.IntN(len(ps))].id
	}
	c := s.begin(n)
	lease := s.swarm.lease > 0 && s.chance(0.7)
	c.read(from, lease, simReadToken{n.run, s.load.newest, lease && len(c.progress) > 0 && c.holdsLease()})
	s.end(n)
}

// readAnswered checks the answers that a transition gave.
func (s *sim) readAnswered(n *simNode, answers []readAnswer) {
	for _, a := range answers {
		token := a.token.(simReadToken)
		if !a.ok {
			s.reads.refused++
			continue
		}
		s.reads.allowed++
		if token.lease {
			s.reads.byLease++
		}
		if token.run != n.run {
			s.fail("21 node %d answers a read of an earlier run", n.i)
		}
		if a.index < token.floor {
			s.fail("21 node %d allows a read as of entry %d, and a client was told of entry %d before it began", n.i, a.index, token.floor)
		}
		if a.index > n.core.commitIndex {
			s.fail("21 node %d allows a read as of entry %d, and has committed %d", n.i, a.index, n.core.commitIndex)
		}
	}
}
