package raft

import "time"

// This file keeps a server whose disk or state machine hangs from leading. Its
// heartbeats would go on, and with them the belief that the cluster works, while
// nothing commits there or nobody is answered (hashicorp/raft 503).

// How long a write or a sync, or applying one run of entries, may take before
// the server is taken for stuck, in election timeouts. A disk that is merely
// slow must not move the leadership about: the next one may be as slow.
const (
	diskPatience  = 10
	applyPatience = 20
)

// stuck tells whether this server can't do a leader's work now, and why.
func (c *core) stuck() (why string, is bool) {
	over := func(since time.Time, patience time.Duration) bool {
		return !since.IsZero() && c.now.Sub(since) >= patience*c.limits.electionTimeout
	}
	switch {
	case over(c.unsyncedSince, diskPatience):
		return "a write or sync of the log", true
	case over(c.applyingSince, applyPatience):
		return "the state machine's Apply", true
	}
	return "", false
}

// fit tells whether this server should lead if it were elected.
func (c *core) fit() bool {
	_, stuck := c.stuck()
	return !stuck && !c.applyFailed && !c.retired
}

// yield gives leadership up if this server is stuck and another one can have
// it. That one campaigns at once.
func (c *core) yield() {
	why, stuck := c.stuck()
	to := c.bestSuccessor()
	if !stuck || to == 0 {
		return
	}
	c.emit(Event{Kind: EventStuck, Detail: why})
	c.sendCampaign(c.progressOf(to))
	c.stepDown(ReasonStuck)
}

// applyBegins and applyEnds tell since when the state machine has been at work.
func (c *core) applyBegins(now time.Time) { c.applyingSince = now }
func (c *core) applyEnds()                { c.applyingSince = time.Time{} }
