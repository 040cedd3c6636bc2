package raft

import (
	"encoding/binary"
	"slices"
	"time"
)

// ledger is what the checks know, outside of all nodes. Numbers in its
// messages are those of the invariants in docs/TESTING.md.
type ledger struct {
	leaders   map[Term]int
	votes     map[voteKey]memberID
	entries   [][]ledgerEntry // by index: every entry that was ever appended anywhere
	committed []ledgerCommit  // committed[i-1] is entry i
	elections int
	sessions  *sessionTable // as of the newest committed entry, taken one entry at a time

	conf    configEntry    // the newest committed configuration
	inForce *configuration // by which the newest committed entry was committed
}

type voteKey struct {
	node, disk int // a node with an empty disk is another voter
	term       Term
}

type ledgerEntry struct {
	term, prevTerm Term
	hash           uint64
	raw            []byte
}

type ledgerCommit struct {
	term    Term
	by      Term // the leader's that committed it
	result  []byte
	machine simMachine // after it
	told    string     // what its proposer is told, if it is about a session
	digest  uint64     // of the sessions after it
}

func (b *ledger) init(s *sim) {
	b.conf, b.inForce = configEntry{1, s.conf}, &s.conf
	b.leaders, b.votes = map[Term]int{}, map[voteKey]memberID{}
	b.entries = make([][]ledgerEntry, 1, 1024)
	b.sessions = newSessionTable()
}

// digestAt is of the sessions after entry i.
func (b *ledger) digestAt(i Index) uint64 {
	if i == 0 {
		return sessionDigest(newSessionTable())
	}
	return b.committed[i-1].digest
}

func sessionDigest(t *sessionTable) uint64 { return contentHash(t.encode(nil)) }

func (b *ledger) machineAt(i Index) simMachine {
	if i == 0 {
		return simMachine{}
	}
	return b.committed[i-1].machine
}

func (b *ledger) commitTerm(i Index) (Term, bool) {
	if i == 0 {
		return 0, true
	}
	if i > Index(len(b.committed)) {
		return 0, false
	}
	return b.committed[i-1].term, true
}

// appended compares new entries of a log with those that others have: the same
// index and term means the same content and the same predecessor, and so by
// induction the same prefix (2).
func (b *ledger) appended(s *sim, node int, e Entries, prevTerm Term) {
	for i := range e.Len() {
		index, term := e.First()+Index(i), e.term(i)
		for Index(len(b.entries)) <= index {
			b.entries = append(b.entries, nil)
		}
		raw := e.raw(i)
		h := contentHash(raw)
		known := slices.IndexFunc(b.entries[index], func(l ledgerEntry) bool { return l.term == term })
		if known < 0 {
			b.entries[index] = append(b.entries[index], ledgerEntry{term, prevTerm, h, raw})
		} else if l := b.entries[index][known]; l.hash != h || l.prevTerm != prevTerm {
			s.fail("2 log matching: entry %d of term %d on node %d differs from another node's (predecessor's term %d, there %d)", index, term, node, prevTerm, l.prevTerm)
		}
		prevTerm = term
	}
}

// unsay forgets a leader and its entries from first on. A cluster's only voter
// leads before its own vote is durable; when it crashes then, its term has never
// left it, and the same term may be led once more, also by another node where
// the members have changed.
func (b *ledger) unsay(first Index, term Term) {
	delete(b.leaders, term)
	for i := first; i < Index(len(b.entries)); i++ {
		b.entries[i] = slices.DeleteFunc(b.entries[i], func(l ledgerEntry) bool { return l.term == term })
	}
}

func (b *ledger) started(s *sim, n *simNode) {
	if n.core.currentTerm < n.maxTermSent {
		s.fail("9 node %d restarts in term %d, after it spoke of term %d", n.i, n.core.currentTerm, n.maxTermSent)
	}
	clear(n.seenMatch)
}

// transition checks what one transition did to a core, before anything leaves.
func (b *ledger) transition(s *sim, n *simNode, out *effects) {
	c := n.core
	if c.role == Dead {
		return
	}
	if out.save != nil {
		b.saved(s, n, out.save)
	}
	if c.role == Leader {
		if n.before.role != Leader || n.before.term != c.currentTerm {
			b.elected(s, n)
		} else if c.log.truncations != n.truncations {
			s.fail("15 leader %d of term %d truncated its log", n.i, c.currentTerm)
		}
		b.checkMatches(s, n)
	}
	if c.durableIndex != n.seenDurable {
		n.seenDurable = c.durableIndex
		if !b.has(n, c.durableIndex, termOf(c, c.durableIndex)) {
			s.fail("12 node %d takes entry %d for durable, which is not on its disk", n.i, c.durableIndex)
		}
	}
	if c.commitIndex > n.before.commit {
		b.commit(s, n, n.before.commit)
	}
	if c.role == Leader {
		b.changes(s, n)
	}
	b.snapshotsHold(s, n)
}

func termOf(c *core, i Index) Term {
	t, _ := c.log.term(i)
	return t
}

func (b *ledger) saved(s *sim, n *simNode, save *Save) {
	for _, e := range save.Entries {
		prev, ok := n.core.log.term(e.First() - 1)
		if !ok {
			s.fail("node %d saves entries from %d on, before its log's start", n.i, e.First())
		}
		if e.First() <= n.applied {
			s.fail("5 node %d replaces entry %d, which it has applied", n.i, e.First())
		}
		b.appended(s, n.i, e, prev)
	}
}

// elected checks a new leader: it is the only one of its term (1), a majority
// of the voters voted for it, and it has everything that was committed in
// earlier terms (3).
func (b *ledger) elected(s *sim, n *simNode) {
	c := n.core
	b.elections++
	if other, ok := b.leaders[c.currentTerm]; ok && other != n.i {
		s.fail("1 nodes %d and %d both lead term %d", other, n.i, c.currentTerm)
	}
	b.leaders[c.currentTerm] = n.i
	n.led = append(n.led, EntryID{c.firstOfTerm, c.currentTerm})
	if !simQuorum(&c.configuration, func(m *member) bool { return m.id == c.self || b.votedFor(s, m, c.self, c.currentTerm) }) || !simMayStand(c.configs, c.self) {
		s.fail("17 node %d leads term %d without the votes of a quorum of %s", n.i, c.currentTerm, simMemberList(&c.configuration))
	}
	for i := c.log.start.Index + 1; i <= Index(len(b.committed)); i++ {
		if e := b.committed[i-1]; e.by < c.currentTerm && !c.log.matches(EntryID{i, e.term}) {
			s.fail("3 leader %d of term %d lacks entry %d of term %d, committed in term %d", n.i, c.currentTerm, i, e.term, e.by)
		}
	}
}

// checkMatches: what a leader takes for durable elsewhere is (8).
func (b *ledger) checkMatches(s *sim, n *simNode) {
	for _, p := range n.core.progress {
		if p.match == n.seenMatch[p.id] {
			continue
		}
		n.seenMatch[p.id] = p.match
		o := s.peer(n.core, p.id)
		if o.left > n.core.currentTerm {
			continue // an old leader has not heard that it left, and its disk may be another one
		}
		if o.term() <= n.core.currentTerm && p.match > n.core.log.start.Index && !b.has(o, p.match, termOf(n.core, p.match)) {
			s.fail("8 leader %d of term %d believes entry %d durable on node %d, whose disk ends at %d", n.i, n.core.currentTerm, p.match, o.i, o.disk.last())
		}
	}
}

func (n *simNode) term() Term {
	if n.core != nil {
		return n.core.currentTerm
	}
	return n.disk.hard.Term
}

// has tells whether the entry is on the node's disk, or part of a snapshot
// there. What was compacted is committed; then the ledger knows its term.
func (b *ledger) has(n *simNode, i Index, term Term) bool {
	if i < n.disk.start.Index || n.snaps.covers(i) {
		t, ok := b.commitTerm(i)
		return ok && t == term
	}
	t, ok := n.disk.term(i)
	return ok && t == term
}

// durable tells whether a quorum of conf has the entry on its disks.
func (b *ledger) durable(s *sim, conf *configuration, i Index, term Term) bool {
	return simQuorum(conf, func(m *member) bool {
		o := s.owner(m)
		return o != nil && b.has(o, i, term)
	})
}

// commit checks that a node's commit index advances over entries that are
// durable on a quorum (6, 7) and that are the same as everybody's (4, 5).
func (b *ledger) commit(s *sim, n *simNode, from Index) {
	c := n.core
	known := Index(len(b.committed))
	conf := b.commitsBy(n)
	for i := from + 1; i <= c.commitIndex; i++ {
		term, ok := c.log.term(i)
		if !ok {
			continue // under the start: compared when it was committed
		}
		if t, ok := b.commitTerm(i); ok {
			if t != term {
				s.fail("5 node %d of term %d commits entry %d of term %d, but it was committed with term %d", n.i, c.currentTerm, i, term, t)
			}
			continue
		}
		b.extend(s, n, i, term)
	}
	if c.commitIndex <= known {
		return
	}
	b.inForce = conf
	if !b.durable(s, conf, c.commitIndex, termOf(c, c.commitIndex)) {
		s.fail("6 node %d (%s) commits entry %d, which is not durable on a quorum of %s", n.i, c.role, c.commitIndex, simMemberList(conf))
	}
	for _, o := range s.nodes {
		if o.core != nil && o.core.role == Leader && o.core.currentTerm > c.currentTerm && c.commitIndex > o.core.log.start.Index &&
			!o.core.log.matches(EntryID{c.commitIndex, termOf(c, c.commitIndex)}) {
			s.fail("3 node %d commits entry %d in term %d, which leader %d of term %d lacks", n.i, c.commitIndex, c.currentTerm, o.i, o.core.currentTerm)
		}
	}
}

// extend adds an entry that nobody had committed before, and executes it on
// the model that all nodes are compared with.
func (b *ledger) extend(s *sim, n *simNode, i Index, term Term) {
	k := slices.IndexFunc(b.entries[i], func(l ledgerEntry) bool { return l.term == term })
	if k < 0 {
		s.fail("node %d commits entry %d of term %d, which was never appended", n.i, i, term)
	}
	raw := b.entries[i][k].raw
	run, err := ParseEntries(i, raw)
	if err != nil {
		s.fail("entry %d: %v", i, err)
	}
	e := ledgerCommit{term: term, by: n.core.currentTerm, machine: b.machineAt(i - 1), digest: b.digestAt(i - 1)}
	b.execute(s, run, &e)
	m := &e.machine
	if at := run.entry(0).Time; at.Before(m.last) && run.kind(0) != entryConfiguration {
		s.fail("entry %d is stamped %v, before its predecessor's %v", i, at, m.last)
	} else if run.kind(0) != entryConfiguration {
		m.last = at
	}
	b.committed = append(b.committed, e)
	if run.kind(0) == entryConfiguration && i > 1 {
		b.entered(s, i, run.data(0), n.core.currentTerm)
	}
}

// execute executes one entry on the model.
func (b *ledger) execute(s *sim, run Entries, e *ledgerCommit) {
	var p portion
	b.sessions.plan(run, 0, &p)
	e.machine.note(run, 0)
	results := make([][]byte, 1)
	for _, cmd := range p.commands {
		results[0] = e.machine.execute(cmd.Data)
		s.load.committed(s, cmd.Index, cmd.Data)
	}
	b.sessions.executed(&p, results)
	e.result = results[0]
	for i := range p.sessions {
		e.told = describeOutcome(p.sessions[i].outcome(EntryID{run.First(), run.term(0)}))
		e.digest = sessionDigest(b.sessions)
	}
}

// sessionsAgree compares what a run of entries did to the sessions of a node,
// and what their proposers are told, with the model (18).
func (b *ledger) sessionsAgree(s *sim, n *simNode, e Entries, results *outcomes) {
	for i := range results.sessions {
		a := &results.sessions[i]
		at := EntryID{e.First() + Index(a.at), e.term(a.at)}
		if told, want := describeOutcome(a.outcome(at)), b.committed[at.Index-1].told; told != want {
			s.fail("18 node %d says %q of entry %v, others %q", n.i, told, at, want)
		}
	}
	if len(results.sessions) > 0 && sessionDigest(n.sessions) != b.digestAt(e.Last()) {
		s.fail("18 node %d has other sessions than others after entry %d", n.i, e.Last())
	}
}

// applied executes an entry on a node and compares (4, 13, 18). cmd is nil if
// the state machine is given none.
func (b *ledger) applied(s *sim, n *simNode, e Entries, i int, cmd []byte) (result []byte) {
	index := e.First() + Index(i)
	if index != n.applied+1 {
		s.fail("13 node %d applies entry %d after %d", n.i, index, n.applied)
	}
	t, ok := b.commitTerm(index)
	if !ok || t != e.term(i) {
		s.fail("4 node %d applies entry %d of term %d, committed is term %d (%v)", n.i, index, e.term(i), t, ok)
	}
	n.applied = index
	n.machine.note(e, i)
	if cmd != nil {
		result = n.machine.execute(cmd)
	}
	want := &b.committed[index-1]
	if n.machine.hash != want.machine.hash || string(result) != string(want.result) {
		s.fail("18 node %d has another state than others after entry %d", n.i, index)
	}
	return result
}

// leaves checks what a message claims against the disk it relies on (9 to 12).
func (b *ledger) leaves(s *sim, n *simNode, m *message) {
	d := n.disk
	var term Term
	switch {
	case m.vote != nil:
		if term = m.vote.Term; m.vote.PreVote {
			term--
		} else {
			b.vote(s, n, term, m.vote.Candidate)
		}
	case m.append != nil:
		term = m.append.Term
	case m.voteReply != nil:
		term = m.voteReply.Term
		if a := m.token.(*simCall).vote; m.voteReply.Granted && !a.PreVote {
			b.vote(s, n, a.Term, a.Candidate)
		}
	case m.appendReply != nil:
		term = m.appendReply.Term
		a := m.token.(*simCall).append
		if m.appendReply.Success && !a.Heartbeat {
			b.acknowledges(s, n, a)
		}
		if m.appendReply.Promised {
			s.promises(n, m.token.(*simCall))
		}
	}
	if d.hard.Term < term {
		s.fail("9 node %d speaks of term %d, its disk of term %d", n.i, term, d.hard.Term)
	}
	n.maxTermSent = max(n.maxTermSent, term)
}

// vote records a vote that leaves: one per node and term (10), durable (11).
func (b *ledger) vote(s *sim, n *simNode, term Term, candidate memberID) {
	k := voteKey{n.i, n.disks, term}
	if old := b.votes[k]; old != 0 && old != candidate {
		s.fail("10 node %d votes for %d in term %d, after it voted for %d", n.i, candidate, term, old)
	}
	b.votes[k] = candidate
	if h := n.disk.hard; h.Term < term || h.Term == term && h.VotedFor != uint64(candidate) {
		s.fail("11 node %d votes for %d in term %d, its disk has %+v", n.i, candidate, term, h)
	}
}

func (b *ledger) acknowledges(s *sim, n *simNode, a *appendArgs) {
	term := a.Prev.Term
	if k := len(a.Entries); k > 0 {
		term = a.Entries[k-1].term(a.Entries[k-1].Len() - 1)
	}
	if !b.has(n, a.lastIndex(), term) {
		s.fail("12 node %d acknowledges entry %d of term %d, its disk ends at %d", n.i, a.lastIndex(), term, n.disk.last())
	}
}

// diskChanged looks again at committed entries when a durable one was replaced.
func (b *ledger) diskChanged(s *sim, n *simNode) {
	low := n.disk.lowest
	n.disk.lowest = 0
	if low == 0 || low > Index(len(b.committed)) {
		return
	}
	for i := low; i <= Index(len(b.committed)); i++ {
		if t, _ := b.commitTerm(i); !b.durable(s, b.inForce, i, t) {
			s.fail("6 node %d replaced committed entry %d on its disk; no quorum has it any more", n.i, i)
		}
	}
}

// durableCommitted returns up to where a node's disk has what is committed, in
// its log or in a snapshot.
func (b *ledger) durableCommitted(n *simNode) Index {
	i := min(n.disk.last(), Index(len(b.committed)))
	for i > n.disk.start.Index {
		if t, _ := n.disk.term(i); t == b.committed[i-1].term {
			break
		}
		i--
	}
	return max(i, n.snaps.newest.Last.Index)
}

// simMachine is the state machine: registers, and a hash of all it has executed.
type simMachine struct {
	keys [simKeys]uint64
	hash uint64
	last time.Time // stamp of the newest entry; kept by the ledger only
}

const simKeys = 6

// simCommand is a command: a unique number, a key, and what to do there.
// Padding varies its size.
func simCommand(id uint64, key byte, write bool, padding int) []byte {
	b := make([]byte, 10+padding)
	binary.LittleEndian.PutUint64(b, id)
	b[8] = key
	if write {
		b[9] = 1
	}
	return b
}

// note takes note of an entry, whether it has a command or not.
func (m *simMachine) note(e Entries, i int) {
	m.hash = (m.hash ^ uint64(e.term(i))<<40 ^ uint64(e.kind(i))) * 0x9e3779b97f4a7c15
}

// execute returns the key's value before the command.
func (m *simMachine) execute(d []byte) []byte {
	id := binary.LittleEndian.Uint64(d)
	m.hash = (m.hash ^ id) * 0x9e3779b97f4a7c15
	result := binary.LittleEndian.AppendUint64(nil, m.keys[d[8]])
	if d[9] == 1 {
		m.keys[d[8]] = id
	}
	return result
}

// finalChecks runs at the end of a seed.
func (s *sim) finalChecks() {
	s.load.judge(s)
}
