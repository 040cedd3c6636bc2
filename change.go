package raft

import (
	"fmt"
	"slices"
)

// This file changes the membership (§6, thesis 4). Every change of the voters
// goes through joint consensus, also that of a single one: one mechanism. The
// leader writes the joint configuration, and once that is committed the one
// that is entered; a later leader goes on where it finds the log.

// configEntry is a configuration and the entry that holds it.
type configEntry struct {
	index Index
	conf  configuration
}

// maxMembers bounds a configuration, learners and leaving members included.
const maxMembers = 128

// entryMemberID numbers the i-th member that the entry at index adds. Founders
// have numbers below 256.
func entryMemberID(index Index, i int) memberID { return memberID(index)<<8 | memberID(i) }

// adoptConfigurations uses every configuration among entries just appended: a
// server uses the newest one in its log, committed or not (§6).
func (c *core) adoptConfigurations(e Entries) {
	for i := range e.Len() {
		if e.kind(i) != entryConfiguration {
			continue
		}
		conf, err := decodeConfiguration(e.data(i))
		if err != nil {
			c.die(fmt.Errorf("raft: entry %d: %w", e.First()+Index(i), err))
			return
		}
		c.configs = append(c.configs, configEntry{e.First() + Index(i), conf})
		c.useNewest()
	}
}

// dropConfigurations goes back to the configuration before entry from, which
// is being truncated.
func (c *core) dropConfigurations(from Index) {
	n := len(c.configs)
	for n > 1 && c.configs[n-1].index >= from {
		n--
	}
	if n < len(c.configs) {
		c.configs = c.configs[:n]
		c.useNewest()
	}
}

// pruneConfigurations forgets those before the newest committed one: they can't
// come back.
func (c *core) pruneConfigurations() {
	for len(c.configs) > 1 && c.configs[1].index <= c.commitIndex {
		c.configs = slices.Delete(c.configs, 0, 1)
	}
}

// ownNumber returns which member a node of this name and directory is, by the
// newest configuration of its log that names it. The newest of all may be one
// without it that is not committed: until then it goes on as what it was.
func (rec *Recovered) ownNumber(name NodeID, directory [16]byte) memberID {
	data := rec.Config
	for i := len(rec.older) - 1; data != nil; i-- {
		conf, err := decodeConfiguration(data)
		switch {
		case err != nil:
			return 0 // newCore says so
		case conf.byName(name) != nil || i < 0:
			return conf.numberOf(name, directory)
		}
		data = rec.older[i].data
	}
	return 0
}

func (c *core) useNewest() {
	c.configuration = c.configs[len(c.configs)-1].conf
	// A configuration that does not name this server leaves it what it was: that
	// may still be needed. One that names a former one under its name does not.
	if m := c.configuration.byName(c.name); m != nil {
		self := c.configuration.numberOf(c.name, c.directory)
		c.self, c.removed = self, c.removed && self == c.self
	}
	if c.role == Leader {
		c.trackMembers(c.log.last)
	}
	c.emit(Event{Kind: EventMembership, Detail: describeMembers(c.configuration.list()), Index: c.configs[len(c.configs)-1].index})
}

// trackMembers gives a leader progress of exactly the other members. Whether
// new ones have what comes before entry next is found out with it.
func (c *core) trackMembers(next Index) {
	var ps []*progress
	for _, m := range c.configuration.members {
		if m.id == c.self {
			continue
		}
		p := c.progressOf(m.id)
		if p == nil {
			p = &progress{id: m.id, next: next, lastContact: c.now}
		}
		ps = append(ps, p)
	}
	c.progress = ps
}

// changeMembers appends a configuration that leads to the members that edit
// makes of the current ones. It returns the entry, or why not: *MembershipError.
func (c *core) changeMembers(edit func(list []Member) ([]Member, error)) (EntryID, error) {
	refuse := func(r MembershipReason) (EntryID, error) {
		return EntryID{}, &MembershipError{Reason: r, Leader: c.leader.label(c)}
	}
	newest := c.configs[len(c.configs)-1]
	switch {
	case c.role != Leader:
		return refuse(MembershipNotLeader)
	case c.log.start.Index < c.inherited:
		return refuse(MembershipTooEarly) // see snapshotTaken
	case c.commitIndex < c.firstOfTerm:
		return refuse(MembershipTooEarly) // else two configurations could overlap without a common majority
	case newest.index > c.commitIndex || newest.conf.joint:
		return refuse(MembershipPending)
	}
	// A change that waits for somebody to catch up has changed no vote yet. The
	// next one may add to it, or take it back: that somebody may never come.
	goal := newest.conf.entered()
	target, err := edit(goal.list())
	if err != nil {
		return EntryID{}, err
	}
	next, voters := c.intend(&newest.conf, target)
	switch {
	case voters == 0:
		return refuse(MembershipNoVoters)
	case len(next.members) > maxMembers:
		return refuse(MembershipTooMany)
	case 2*c.reachable(&next) <= voters:
		return refuse(MembershipQuorum)
	}
	if !slices.ContainsFunc(next.members, func(m member) bool { return m.next == becomesVoter }) && next.changing() {
		next.joint = true // nobody has to catch up first
	}
	return c.appendConfiguration(next), nil
}

// appendConfiguration appends conf, whose members nobody else holds, and notes
// in it the directories that it lacks. So a member that is added is known by
// its directory before it votes, as a founder is: what was counted on is there.
func (c *core) appendConfiguration(conf configuration) EntryID {
	for i := range conf.members {
		m := &conf.members[i]
		if p := c.progressOf(m.id); p != nil && m.dirID == ([16]byte{}) {
			m.dirID = p.directory
		}
	}
	id := EntryID{c.log.last + 1, c.currentTerm}
	c.appendLocal(makeEntry(entryConfiguration, id, c.stamp(), conf.encode()))
	return id
}

// intend notes in each member what target makes of it, and counts the voters
// then. A new member begins as a learner. What concerns only learners and
// addresses is done at once.
func (c *core) intend(conf *configuration, target []Member) (next configuration, voters int) {
	next.clusterUUID = conf.clusterUUID
	for _, m := range conf.members {
		i := slices.IndexFunc(target, func(t Member) bool { return t.ID == m.name })
		switch {
		case i < 0 && m.learner:
			continue
		case i < 0:
			m.next = leaves
		case target[i].Learner == m.learner:
			m.addr, m.next = target[i].Addr, staysAsIs
		case m.learner:
			m.addr, m.next = target[i].Addr, becomesVoter
		default:
			m.addr, m.next = target[i].Addr, becomesLearner
		}
		next.members = append(next.members, m)
	}
	added := 0
	for _, t := range target {
		if conf.byName(t.ID) != nil {
			continue
		}
		m := member{id: entryMemberID(c.log.last+1, added), name: t.ID, addr: t.Addr, learner: true}
		if !t.Learner {
			m.next = becomesVoter
		}
		next.members = append(next.members, m)
		added++
	}
	for i := range next.members {
		if next.members[i].votes(true) {
			voters++
		}
	}
	return next, voters
}

// reachable counts the voters to be that answer. New ones count: they must
// answer before they are counted on.
func (c *core) reachable(next *configuration) (n int) {
	for i := range next.members {
		m := &next.members[i]
		p := c.progressOf(m.id)
		if m.votes(true) && (m.id == c.self || m.learner || p != nil && c.now.Sub(p.lastContact) < c.limits.electionTimeout) {
			n++
		}
	}
	return n
}

// mayStand tells whether this server may stand for election. One that is no
// voter any more by a configuration not known to be committed still may: it can
// be the only one that has that entry, and no other would get its vote. Its own
// vote does not count then (thesis 4.2.2).
func (c *core) mayStand() bool {
	n := len(c.configs)
	return c.configuration.voter(c.self) || n > 1 && c.configs[n-1].index > c.commitIndex && c.configs[n-2].conf.voter(c.self)
}

// wasRemoved tells whether id was a member and is none any more, for certain:
// the newest committed configuration is later than the entry that added it.
func (c *core) wasRemoved(id memberID) bool {
	conf := c.configs[0]
	return conf.index > 0 && conf.index <= c.commitIndex && Index(id>>8) <= conf.index && !conf.conf.has(id)
}

// changeDone tells whether the change that began with entry id is finished, or
// came to nothing because another leader's entry is in its place.
func (c *core) changeDone(id EntryID) (bool, error) {
	if t, ok := c.log.term(id.Index); ok && t != id.Term || c.log.last < id.Index {
		return true, ErrSuperseded
	}
	newest := c.configs[len(c.configs)-1]
	return newest.index >= id.Index && newest.index <= c.commitIndex && !newest.conf.changing(), nil
}

// directoryOf returns the ID of the only data directory that may speak for a
// member, zero if any may: the one in the configuration, on a leader otherwise
// the one that answered it first.
func (c *core) directoryOf(id memberID) [16]byte {
	if m := c.configuration.find(id); m != nil && m.dirID != ([16]byte{}) {
		return m.dirID
	}
	if p := c.progressOf(id); p != nil {
		return p.directory
	}
	return [16]byte{}
}

// changing tells whether the configuration is one on the way to another.
func (conf *configuration) changing() bool {
	return slices.ContainsFunc(conf.members, func(m member) bool { return m.next != staysAsIs })
}

// entered returns the configuration at the end of the way.
func (conf *configuration) entered() configuration {
	out := configuration{clusterUUID: conf.clusterUUID}
	for _, m := range conf.members {
		if m.next == leaves {
			continue
		}
		m.learner, m.next = !m.votes(true), staysAsIs
		out.members = append(out.members, m)
	}
	return out
}

// continueChange takes the next step of a change once the last one is
// committed, whichever leader began it.
func (c *core) continueChange() {
	newest := c.configs[len(c.configs)-1]
	if c.role != Leader || newest.index > c.commitIndex || c.commitIndex < c.firstOfTerm {
		return
	}
	switch conf := newest.conf; {
	case conf.joint:
		c.appendConfiguration(conf.entered())
	case conf.changing() && c.caughtUp(&conf):
		conf.members = slices.Clone(conf.members)
		conf.joint = true
		c.appendConfiguration(conf)
	case !conf.voter(c.self) && !conf.changing():
		c.leave(&conf)
	}
}

// leave ends the leadership of a leader that is no voter any more. It led until
// the configuration without it was committed (§6); now the best of the others
// campaigns at once, so that nobody waits for an election timeout.
func (c *core) leave(conf *configuration) {
	if to := c.bestSuccessor(); to != 0 {
		c.sendCampaign(c.progressOf(to))
	}
	c.stepDown(ReasonRemoved)
	if !conf.has(c.self) {
		c.removed = true
		c.emit(Event{Kind: EventRemoved, Peer: c.name})
	}
}

// caughtUp tells whether those who are to become voters have the log as it was
// a heartbeat ago: they would not hold up a commit (thesis 4.2.1).
func (c *core) caughtUp(conf *configuration) bool {
	return c.lagging(conf) == nil
}

// lagging returns the first of those who are to become voters that has not
// caught up, nil if there is none.
func (c *core) lagging(conf *configuration) *progress {
	for _, m := range conf.members {
		if p := c.progressOf(m.id); m.next == becomesVoter && p != nil && p.match < c.heartbeatLast {
			return p
		}
	}
	return nil
}

// unfinished says what the change under way waits for, where this server knows.
func (c *core) unfinished(cause error) error {
	newest := c.configs[len(c.configs)-1].conf
	if p := c.lagging(&newest); c.role == Leader && p != nil {
		return &LaggingError{Node: p.id.label(c), Match: p.match, Last: c.log.last, Err: cause}
	}
	return cause
}
