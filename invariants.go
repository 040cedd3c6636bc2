package raft

import "time"

// coreSnapshot is what the step invariants compare with.
type coreSnapshot struct {
	term     Term
	vote     memberID
	role     Role
	commit   Index
	start    Index
	last     Index
	lsn      LSN
	deadline time.Time
	promised time.Time
}

func (c *core) snapshot() coreSnapshot {
	return coreSnapshot{c.currentTerm, c.votedFor, c.role, c.commitIndex, c.log.start.Index, c.log.last, c.lsn, c.electionDeadline, c.promisedUntil}
}

// checkStep returns what must never be false of one transition.
func (c *core) checkStep(before coreSnapshot) error {
	switch {
	case c.currentTerm < before.term:
		return invariantError("term went back from %d to %d", before.term, c.currentTerm)
	case c.currentTerm == before.term && before.vote != 0 && c.votedFor != before.vote:
		return invariantError("vote of term %d changed from %d to %d", c.currentTerm, before.vote, c.votedFor)
	case c.commitIndex < before.commit:
		return invariantError("commit index went back from %d to %d", before.commit, c.commitIndex)
	case c.log.start.Index < before.start:
		return invariantError("log start went back from %d to %d", before.start, c.log.start.Index)
	case before.role == Leader && c.role == Leader && c.currentTerm == before.term && c.log.last < before.last:
		return invariantError("leader of term %d shortened its log from %d to %d", c.currentTerm, before.last, c.log.last)
	case before.role == Leader && c.role == Leader && c.currentTerm != before.term:
		return invariantError("leader of term %d leads term %d without an election", before.term, c.currentTerm)
	case before.role == Dead && c.role != Dead:
		return invariantError("a dead node became %s", c.role)
	case c.promisedUntil.Before(before.promised):
		return invariantError("a promise was cut short from %v to %v", before.promised, c.promisedUntil)
	case c.lsn < before.lsn:
		return invariantError("position went back from %d to %d", before.lsn, c.lsn)
	}
	return c.checkState()
}

// checkState returns what must never be false of a core between transitions.
func (c *core) checkState() error {
	l := &c.log
	switch {
	case c.role == Dead:
		return nil
	case l.start.Index > c.commitIndex || c.commitIndex > l.last:
		return invariantError("want start %d <= commit %d <= last %d", l.start.Index, c.commitIndex, l.last)
	case c.durableIndex > l.last:
		return invariantError("durable %d is beyond the log's end %d", c.durableIndex, l.last)
	case l.saved != l.last || l.savedStart != l.start:
		return invariantError("a transition ended with unsaved log")
	case c.hardSaved != c.hardState():
		return invariantError("a transition ended with unsaved hard state")
	case c.role != Leader && len(c.progress) != 0:
		return invariantError("%s keeps progress", c.role)
	case c.role == Leader && c.leader != c.self:
		return invariantError("leader follows %d", c.leader)
	case c.role == Candidate && c.votedFor != c.self:
		return invariantError("candidate of term %d voted for %d", c.currentTerm, c.votedFor)
	case c.promisedUntil.Sub(c.now) > c.savedPromise:
		return invariantError("a promise goes on for %v, saved is %v", c.promisedUntil.Sub(c.now), c.savedPromise)
	case c.lastTermInLog() > c.currentTerm:
		return invariantError("log has term %d, current is %d", c.lastTermInLog(), c.currentTerm)
	}
	if err := l.check(); err != nil {
		return err
	}
	for i, u := range c.unsynced {
		if i > 0 && u.lsn <= c.unsynced[i-1].lsn || u.lsn <= c.durableLSN || u.lsn > c.lsn {
			return invariantError("unsynced positions out of order at %d", u.lsn)
		}
	}
	for _, p := range c.progress {
		if err := c.checkProgress(p); err != nil {
			return err
		}
	}
	return nil
}

func (c *core) lastTermInLog() Term { return c.log.lastID().Term }

func (c *core) checkProgress(p *progress) error {
	bytes := 0
	for _, s := range p.inflight {
		bytes += s.bytes
	}
	switch {
	case p.match > c.log.last:
		return invariantError("match %d of member %d is beyond the log's end %d", p.match, p.id, c.log.last)
	case p.next <= p.match || p.next > c.log.last+1:
		return invariantError("next %d of member %d, match %d, last %d", p.next, p.id, p.match, c.log.last)
	case bytes != p.inflightBytes:
		return invariantError("window of member %d holds %d bytes, says %d", p.id, bytes, p.inflightBytes)
	case len(p.inflight) > c.limits.maxInflight:
		return invariantError("window of member %d holds %d appends, limit %d", p.id, len(p.inflight), c.limits.maxInflight)
	case p.state == probing && len(p.inflight) > 1:
		return invariantError("%d probes of member %d at once", len(p.inflight), p.id)
	}
	return nil
}

// check verifies the log's bookkeeping, in time proportional to runs in memory.
func (l *raftLog) check() error {
	for i, r := range l.runs {
		if i > 0 && (r.Index <= l.runs[i-1].Index || r.Term <= l.runs[i-1].Term) {
			return invariantError("term runs out of order: %v after %v", r, l.runs[i-1])
		}
	}
	if l.last > l.start.Index && (len(l.runs) == 0 || l.runs[0].Index > l.start.Index+1 || l.runs[len(l.runs)-1].Index > l.last) {
		return invariantError("term runs %v do not cover %d to %d", l.runs, l.start.Index+1, l.last)
	}
	bytes := 0
	for i, e := range l.tail {
		bytes += e.size()
		if e.Len() == 0 || i > 0 && e.First() != l.tail[i-1].Last()+1 {
			return invariantError("gap in memory before entry %d", e.First())
		}
	}
	if len(l.tail) > 0 && l.tail[len(l.tail)-1].Last() != l.last {
		return invariantError("memory ends at %d, log at %d", l.tail[len(l.tail)-1].Last(), l.last)
	}
	if bytes != l.tailBytes {
		return invariantError("memory holds %d bytes, says %d", bytes, l.tailBytes)
	}
	return nil
}
