package raft

import "time"

// This file keeps a server from leading whose disk or state machine hangs, whose
// state machine has failed, or whose disk is full. Its heartbeats would go on,
// and with them the belief that the cluster works, while nothing commits there or
// nobody is answered (hashicorp/raft 503).
//
// Such a server may still have entries that the others of a majority lack, and
// then it refuses them its vote. Unless its disk hangs it leads for as long as it
// takes to bring one of them up to date, and hands leadership to that one.

// How long a write or a sync, or applying one run of entries, may take before
// the server is taken for stuck, in election timeouts. A disk that is merely
// slow must not move the leadership about: the next one may be as slow.
const (
	diskPatience  = 10
	applyPatience = 20
)

// diskHangs and applyHangs tell whether this server can't do a leader's work now.
func (c *core) diskHangs() bool  { return c.hangs(c.unsyncedSince, diskPatience) }
func (c *core) applyHangs() bool { return c.hangs(c.applyingSince, applyPatience) }

func (c *core) hangs(since time.Time, patience time.Duration) bool {
	return !since.IsZero() && c.now.Sub(since) >= patience*c.limits.electionTimeout
}

// fit tells whether this server should lead if it were elected.
func (c *core) fit() bool {
	return !c.diskHangs() && !c.applyHangs() && !c.applyFailed && !c.retired && (c.full == nil || c.alone())
}

// needed tells whether this server should campaign though it is not fit: it has
// refused its vote to one that lacks entries which it has, and has heard of no
// leader since. There may be no majority without the two of them.
func (c *core) needed() bool { return c.heldUp && !c.diskHangs() && !c.retired }

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
		c.yield()
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
	case c.full != nil && !c.seeksSuccessor():
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

// seeksSuccessor tells whether this leader was elected with a full disk (needed),
// and will find out by its first commit who can take over, or by the answers that
// nobody can. Proposals wait for that.
func (c *core) seeksSuccessor() bool {
	return c.full != nil && c.commitIndex < c.firstOfTerm && c.bestSuccessor() != 0
}

// yield gives leadership up if this server should not lead and another one can
// have it. The transfer waits until the other one has everything, and proposals
// wait with it: they are the other's to append. Only where the disk hangs there
// is nothing to wait for: the other one campaigns at once.
func (c *core) yield() {
	if c.role != Leader || c.fit() {
		return
	}
	to := c.bestSuccessor()
	switch {
	case to == 0:
	case c.diskHangs():
		c.emit(Event{Kind: EventStuck, Detail: "a write or sync of the log"})
		c.sendCampaign(c.progressOf(to))
		c.stepDown(ReasonStuck)
	case c.transfer.to == 0:
		if c.applyHangs() {
			c.emit(Event{Kind: EventStuck, Detail: "the state machine's Apply"})
		}
		_ = c.transferLeadership(to) // its error would say that there is nobody
	}
}

// applyBegins and applyEnds tell since when the state machine has been at work,
// and up to where it has applied the log.
func (c *core) applyBegins(now time.Time) { c.applyingSince = now }
func (c *core) applyEnds(last Index) {
	c.applyingSince = time.Time{}
	c.lastApplied = last
	c.evict()
}
