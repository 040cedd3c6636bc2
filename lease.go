package raft

import "time"

// This file is about leases (thesis 6.4.1): a leader that knows that nobody else
// can be elected for a while answers reads without asking anybody. It does not
// infer that from election timeouts, which may differ from node to node, but
// from promises: a heartbeat says how long a promise the leader wants, and a
// server that answers it grants no vote to anybody else for so long. The
// argument for safety is in docs/DESIGN.md, "Reads and leases".

// maxLeasePromise bounds what a leader may ask for: a server that has promised
// is no use to anybody else for so long, also after a restart.
const maxLeasePromise = time.Minute

// promise makes the promise that a heartbeat of the current term asks for, if it
// asks for one. The reply that tells of it waits until its length is durable.
//
// One that ends before an earlier one changes nothing. Any other covers all that
// were made before, so its length is enough after a restart, and may be shorter
// than what was saved: whenever that is written, what is on disk reaches as far
// as every promise that anybody was told of.
func (c *core) promise(a *appendArgs) bool {
	if until := c.now.Add(a.Lease); (a.Heartbeat || a.Lease > 0) && !until.Before(c.promisedUntil) {
		c.savedPromise = a.Lease
		if a.Lease > 0 {
			c.promisedUntil = until
		}
	}
	if a.Lease == 0 {
		return false
	}
	c.promisedTo = a.Leader
	return true
}

// hasPromisedAgainst tells whether a promise forbids a vote for candidate, which
// may be this server. Not that of the leader to whom it was made: it has no
// lease any more where it is a candidate.
func (c *core) hasPromisedAgainst(candidate memberID) bool {
	return c.promisedTo != candidate && c.now.Before(c.promisedUntil)
}

// askPromise makes a heartbeat ask for a promise, unless this leader may not
// have a lease any more. What is promised counts from now, before it is sent.
func (c *core) askPromise(a *appendArgs) {
	if c.leaseGivenUp {
		return
	}
	a.Lease = c.limits.leasePromise
	a.asked = c.now.Add(c.slept.atLeast)
}

// onPromise takes note that a member keeps what a, sent by this leader, asked
// of it.
func (c *core) onPromise(p *progress, a *appendArgs) {
	if end := a.asked.Add(c.limits.lease); end.After(p.leaseEnd) {
		p.leaseEnd = end
	}
}

// holdsLease tells whether nobody else can have been elected yet. Of this
// server nobody needs a promise: what makes it vote for another, or campaign,
// ends its leadership in the same transition.
//
// The newest configuration is enough. An entry of this term is committed, so at
// most one configuration is not, and quorums of adjacent ones overlap.
func (c *core) holdsLease() bool {
	if c.role != Leader || c.limits.lease == 0 || c.leaseGivenUp || c.commitIndex < c.firstOfTerm {
		return false
	}
	now := c.now.Add(c.slept.atMost)
	promised := append(c.promisedScratch[:0], c.self)
	for _, p := range c.progress {
		if now.Before(p.leaseEnd) {
			promised = append(promised, p.id)
		}
	}
	c.promisedScratch = promised
	return c.configuration.quorum(promised)
}

// read asks for the index of a read that `from` makes. Where a lease will do it
// is the current commit index: all that anybody was told of is committed here.
func (c *core) read(from memberID, lease bool, token any) {
	if !lease || !c.holdsLease() {
		c.readIndex(from, token)
		return
	}
	c.out.answers = append(c.out.answers, readAnswer{token, c.commitIndex, true})
	c.onForward(from, c.commitIndex) // somebody waits there to see it applied
}

// leaseWithin returns how much of a promise a leader may count on by a clock
// that is slower than others by driftPercent.
func leaseWithin(promise time.Duration, driftPercent int) time.Duration {
	return promise * 100 / time.Duration(100+driftPercent)
}

// sleep is for how long the machine has slept since some moment in the past,
// while the clock behind now stood still: no less and no more than this. A
// promise made to a leader does not wait for it to wake up.
type sleep struct{ atLeast, atMost time.Duration }

// forever is longer than any promise: whoever may have slept so long has no lease.
const forever time.Duration = 1 << 62

// sleepClock tells for how long the machine has slept. Only differences of what
// it returns mean something.
type sleepClock func() (sleep, error)
