package raft

import (
	"fmt"
	"time"
)

// This file replaces the log by snapshots: §7, thesis 5. Writing one, sending
// it and restoring it are done outside; here is what they mean for the log.

// SnapshotMeta is what a snapshot says of the log that it replaces.
type SnapshotMeta struct {
	ID          [16]byte  // random: two nodes' snapshots up to one entry may differ in their bytes
	Last        EntryID   // the last entry that it includes
	Time        time.Time // no later entry has an earlier one
	ConfigIndex Index     // of the newest configuration entry up to Last
	Config      []byte    // that entry's data
	Sessions    uint64    // bytes of client sessions, with which the snapshot begins; the state machine's follow
}

// snapshotArgs is InstallSnapshot (Figure 13): one block of a leader's
// snapshot. The receiver takes a block only where its copy ends, and says where
// that is, so that a transfer goes on where it broke off.
type snapshotArgs struct {
	Term   Term
	Leader memberID
	Meta   SnapshotMeta
	Size   uint64 // of the whole snapshot, in bytes
	Offset uint64 // of Data in it
	Data   []byte
}

type snapshotReply struct {
	Term   Term
	Offset uint64 // the receiver has this much
	Done   bool   // it has everything up to Meta.Last, from here or elsewhere
}

// snapshotRequest asks for the newest snapshot to be sent to a follower. The
// answer enters through snapshotSent.
type snapshotRequest struct {
	to   memberID
	term Term
}

// snapshotTaken takes note that a snapshot of this server's state is durable.
// Only now may the log go: up to and including entry upTo, at most to the
// snapshot's end. Entries above upTo stay for followers that are behind. What
// was inherited from another cluster is for nobody: whoever got it would take
// itself for a member of that one, until it got the rest.
func (c *core) snapshotTaken(last EntryID, upTo Index) {
	if c.role == Dead || last.Index <= c.newestSnapshot.Index {
		return
	}
	c.newestSnapshot = last
	c.emit(Event{Kind: EventSnapshotTaken, Index: last.Index})
	if c.full != nil {
		upTo = last.Index // what is kept for convenience is worth less than space
	}
	c.compact(min(max(upTo, c.inherited), last.Index))
}

// snapshotPatience is how long a follower that is sent a snapshot, or what
// follows it, may make no progress, in election timeouts. The log is kept for it
// for so long.
const snapshotPatience = 10

// compact forgets entries up to and including i, which must be applied. Those
// that follow a snapshot on its way to a follower stay until the follower has
// them: else it would need the next snapshot, and the one after that. What is not durable stays as well:
// a snapshot may be written sooner than the log. And so does the newest entry:
// after a restart its time is the least for the next one.
func (c *core) compact(i Index) {
	if c.role == Dead {
		return
	}
	if i > c.commitIndex {
		panic(invariantError("compact at %d beyond commit %d", i, c.commitIndex))
	}
	i = min(i, c.durableIndex)
	for _, p := range c.progress {
		switch {
		case p.state == snapshotting:
			i = min(i, p.snapshot)
		case p.catchingUp && c.now.Sub(p.lastProgress) < snapshotPatience*c.limits.electionTimeout:
			i = min(i, max(p.match, p.snapshot))
		}
	}
	c.log.compact(min(i, c.log.last-1))
}

// sendSnapshot begins to send a follower the newest snapshot: it lacks even
// the last entry that was compacted (§7).
func (c *core) sendSnapshot(p *progress) {
	p.probeFrom(p.match+1, c.appendSeq) // its window is given up
	p.state, p.catchingUp = snapshotting, false
	p.snapshot = c.newestSnapshot.Index
	c.emit(Event{Kind: EventFollowerStarved, Peer: p.id.label(c), Index: c.log.start.Index})
	c.out.snapshots = append(c.out.snapshots, snapshotRequest{p.id, c.currentTerm})
}

// snapshotProgress takes note of how much a follower has. It returns false if
// the transfer has become pointless.
func (c *core) snapshotProgress(q snapshotRequest, sent, size uint64) bool {
	p := c.progressOf(q.to)
	if c.role != Leader || p == nil || q.term != c.currentTerm || p.state != snapshotting {
		return false
	}
	p.snapshotSent, p.snapshotSize = sent, size
	return true
}

// snapshotSent takes note that a follower has everything up to last, or, with
// an error, that the transfer broke off. Its log is found out by probing, as
// ever: an acknowledgement is the only thing that raises match.
func (c *core) snapshotSent(q snapshotRequest, last EntryID, err error) {
	p := c.progressOf(q.to)
	if c.role != Leader || p == nil || q.term != c.currentTerm || p.state != snapshotting {
		return
	}
	next := p.match + 1
	if err == nil {
		next = last.Index + 1
		p.snapshot, p.catchingUp, p.lastProgress = last.Index, true, c.now
	}
	// There must be an entry to probe with, also if nothing followed the snapshot.
	p.probeFrom(min(next, c.log.last), c.appendSeq)
	p.paused = err != nil // the next heartbeat tries again
}

// onInstallSnapshot is InstallSnapshot's receiver (Figure 13) as far as the
// rules go: it returns true if the block is wanted.
func (c *core) onInstallSnapshot(a *snapshotArgs, r *snapshotReply) bool {
	if c.role != Dead && a.Term >= c.currentTerm {
		if c.role == Leader && a.Term == c.currentTerm {
			panic(invariantError("two leaders in term %d: %d and %d", a.Term, c.self, a.Leader))
		}
		c.follow(a.Term, a.Leader)
		r.Done = a.Meta.Last.Index <= c.commitIndex // an older one tells nothing
	}
	r.Term = c.currentTerm
	return c.role != Dead && a.Term == c.currentTerm && !r.Done
}

// installSnapshot puts a durable snapshot in the log's place: §7. A log that
// has the snapshot's last entry keeps everything, and what is committed by this
// is applied from it; any other log is replaced, and the state machine must be
// restored. A snapshot that ends at or before commitIndex changes nothing of
// that; it may be the newest one of this server all the same.
func (c *core) installSnapshot(meta *SnapshotMeta) {
	if c.role == Dead || meta.Last.Index <= c.newestSnapshot.Index {
		return
	}
	if meta.Last.Index <= c.commitIndex {
		c.newestSnapshot = meta.Last
		return
	}
	conf, err := decodeConfiguration(meta.Config)
	if err != nil {
		c.die(fmt.Errorf("raft: snapshot up to entry %d: %w", meta.Last.Index, err))
		return
	}
	c.newestSnapshot = meta.Last
	c.commitIndex = meta.Last.Index
	if c.log.matches(meta.Last) {
		return
	}
	if c.role == Leader {
		panic(invariantError("leader of term %d lacks entry %v, which a snapshot includes", c.currentTerm, meta.Last))
	}
	if c.role == Candidate || c.campaign != nil {
		c.stepDown(ReasonSnapshot) // it was begun with another log, perhaps as another member
	}
	c.log.replace(meta.Last)
	c.replacedBy = meta
	for i := range c.unsynced {
		c.unsynced[i].last = min(c.unsynced[i].last, meta.Last.Index)
	}
	c.durableIndex = meta.Last.Index // the snapshot is durable; its own entries are all there is
	c.noteTime(meta.Time)
	c.configs = []configEntry{{meta.ConfigIndex, conf}}
	c.useNewest()
	c.emit(Event{Kind: EventSnapshotInstalled, Index: meta.Last.Index})
}

// continues takes note of what a state machine on disk includes, which is
// committed. The log must have it, or begin after it.
func (c *core) continues(meta *SnapshotMeta) error {
	if meta.Last.Index < c.log.start.Index {
		return nil // a snapshot follows
	}
	if !c.log.matches(meta.Last) {
		return &StateMachineError{State: meta.Last, Log: c.log.lastID()}
	}
	c.commitIndex = max(c.commitIndex, meta.Last.Index)
	c.noteTime(meta.Time)
	return nil
}

// restored continues, after a restart, from a snapshot whose state the state
// machine has. If this server stopped between storing it and replacing its
// log, the log is replaced now.
func (c *core) restored(meta *SnapshotMeta) {
	if meta.Last.Term > c.currentTerm {
		c.becomeFollower(meta.Last.Term, 0, ReasonSnapshot, 0) // it was durable before the term was
	}
	c.noteTime(meta.Time)
	c.installSnapshot(meta)
	if c.electionDeadline.IsZero() && len(c.configuration.members) > 0 {
		c.armElection()
	}
}
