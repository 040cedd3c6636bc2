package raft

import "time"

// This file keeps a server from leading whose disk or state machine hangs, or
// whose disk is full. Its heartbeats would go on, and with them the belief that
// the cluster works, while nothing commits there or nobody is answered
// (hashicorp/raft 503).

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
	return !stuck && !c.applyFailed && !c.retired && (c.full == nil || c.alone())
}

// alone tells whether this server is the only voter: then nobody else can serve
// at least reads.
func (c *core) alone() bool { return c.configuration.quorum([]memberID{c.self}) }

// diskSpace takes note that the log can't grow any more because the disk is
// full, or, with nil, that it can again.
func (c *core) diskSpace(full error) {
	was := c.full
	c.full, c.lacksRoom = full, c.lacksRoom && full != nil
	switch {
	case c.role == Dead || (was == nil) == (full == nil):
	case full == nil:
		c.emit(Event{Kind: EventDiskSpace})
	default:
		c.emit(Event{Kind: EventDiskFull, Err: full})
		// What a snapshot includes need not be in the log too. Some of that was
		// kept for followers that are a little behind.
		c.compact(min(c.newestSnapshot.Index, c.commitIndex))
		c.yieldForSpace()
	}
}

// yieldForSpace hands leadership to a server with space, if this one has none.
// The transfer waits until the other one has everything, and proposals wait with
// it: they are the other's to append.
func (c *core) yieldForSpace() {
	if c.role == Leader && c.full != nil && c.transfer.to == 0 {
		if to := c.bestSuccessor(); to != 0 {
			_ = c.transferLeadership(to) // its error would say that there is nobody
		}
	}
}

// outOfSpace tells whether proposals made here must be refused: because this
// leader's disk is full and leadership can't be handed on, because too few of the
// others have space for anything to be committed, or because this follower has
// no room for what the leader sends, so that it would not see their results.
func (c *core) outOfSpace() bool {
	switch {
	case c.role != Leader:
		return c.lacksRoom
	case c.transfer.to != 0:
		return false // they wait for whoever takes over
	case c.full != nil:
		return true
	}
	full := false
	for _, p := range c.progress {
		full = full || p.full
	}
	if !full {
		return false
	}
	s := append(c.spaceScratch[:0], c.self)
	for _, p := range c.progress {
		if !p.full {
			s = append(s, p.id)
		}
	}
	c.spaceScratch = s
	return !c.configuration.quorum(s)
}

// yield gives leadership up if this server is stuck and another one can have
// it. That one campaigns at once.
func (c *core) yield() {
	c.yieldForSpace()
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
