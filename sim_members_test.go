package raft

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Membership in the simulator: in some seeds nodes join with empty logs, leave,
// are replaced, promoted and demoted, one or several at once, and leadership is
// transferred, while everything else goes wrong too.

// simMembers counts what became of the changes.
type simMembers struct {
	begun, committed, transfers, wiped int
	refused                            [len(membershipReasons)]int
}

func (t *simMembers) add(o *simMembers) {
	t.begun += o.begun
	t.committed += o.committed
	t.transfers += o.transfers
	t.wiped += o.wiped
	for i := range t.refused {
		t.refused[i] += o.refused[i]
	}
}

func (t *simMembers) String() string {
	n := 0
	for _, k := range t.refused {
		n += k
	}
	return fmt.Sprintf("%d changes of members begun and %d refused, %d configurations committed, %d transfers, %d disks emptied", t.begun, n, t.committed, t.transfers, t.wiped)
}

// drawMembers decides whether the membership changes. It has dice of its own,
// so that the other seeds stay what they are.
func (s *sim) drawMembers() {
	dice := rand.New(rand.NewPCG(s.seed, 0xc4a9))
	if w := &s.swarm; dice.Float64() < 0.35 {
		w.spares = 1 + dice.IntN(4)
		w.membersEvery = time.Duration(float64(w.timeout) * s.logUniform(0.1, 6))
		w.lagMax = min(w.lagMax, 150) // a new node must catch up in ten timeouts
	}
}

func simName(i int) NodeID { return NodeID(fmt.Sprint(i)) }

func simDirectory(node, disk int) [16]byte {
	return [16]byte{'d', byte(node), byte(disk), byte(disk >> 8)}
}

func simMemberList(conf *configuration) string {
	var b strings.Builder
	for i, m := range conf.members {
		b.WriteString([]string{" ", ""}[flag(i == 0, 1)])
		b.WriteString(string(m.name))
		b.WriteString([]string{"", "+", "-", "!"}[m.next])
		if m.learner {
			b.WriteString("(learner)")
		}
	}
	if conf.joint {
		b.WriteString(" joint")
	}
	return "{" + b.String() + "}"
}

// node returns whose name it is.
func (s *sim) node(name NodeID) *simNode {
	return s.nodes[slices.IndexFunc(s.nodes, func(n *simNode) bool { return n.name == name })]
}

// peer returns whom a core reaches under a member's number, nil if nobody.
func (s *sim) peer(c *core, id memberID) *simNode {
	m := c.configuration.find(id)
	if m == nil {
		return nil
	}
	return s.node(m.name)
}

// owner returns the node that is this member, nil if its disk is another one now.
func (s *sim) owner(m *member) *simNode {
	o := s.node(m.name)
	if m.dirID != ([16]byte{}) && m.dirID != simDirectory(o.i, o.disks) {
		return nil
	}
	return o
}

// acquainted is the handshake: who dials may know the other with another
// directory. Who is dialled accepts anybody who has the cluster's log.
func (s *sim) acquainted(n *simNode, to memberID, o *simNode) bool {
	known := n.core.directoryOf(to)
	return known == ([16]byte{}) || known == simDirectory(o.i, o.disks)
}

// simQuorum is the model's idea of a quorum (§6): a majority of the voters as
// they are, and, while the configuration is joint, of the voters as they will be.
func simQuorum(conf *configuration, has func(m *member) bool) bool {
	majority := func(votes func(m *member) bool) bool {
		n, of := 0, 0
		for i := range conf.members {
			if m := &conf.members[i]; votes(m) {
				of++
				if has(m) {
					n++
				}
			}
		}
		return 2*n > of
	}
	return majority(votesNow) && (!conf.joint || majority(votesThen))
}

func votesNow(m *member) bool  { return !m.learner }
func votesThen(m *member) bool { return m.next == becomesVoter || m.next == staysAsIs && !m.learner }

// simMayStand tells whether a member may stand for election: a voter by the
// newest configuration or the one before it, which may still decide.
func simMayStand(confs []configEntry, id memberID) bool {
	for _, e := range confs[max(len(confs)-2, 0):] {
		if m := e.conf.find(id); m != nil && (votesNow(m) || e.conf.joint && votesThen(m)) {
			return true
		}
	}
	return false
}

// intersect tries all sets of members: no two that don't overlap may both decide.
func intersect(a, b *configuration) bool {
	var ids []memberID
	for _, conf := range []*configuration{a, b} {
		for _, m := range conf.members {
			if !slices.Contains(ids, m.id) {
				ids = append(ids, m.id)
			}
		}
	}
	for set := range 1 << len(ids) {
		var in, out []memberID
		for i, id := range ids {
			if set&(1<<i) != 0 {
				in = append(in, id)
			} else {
				out = append(out, id)
			}
		}
		if a.quorum(in) && b.quorum(out) {
			return false
		}
	}
	return true
}

// votedFor tells whether the node behind a member voted for the candidate.
func (b *ledger) votedFor(s *sim, m *member, candidate memberID, term Term) bool {
	o := s.node(m.name)
	for disk := range o.disks + 1 {
		if (m.dirID == [16]byte{} || m.dirID == simDirectory(o.i, disk)) && b.votes[voteKey{o.i, disk, term}] == candidate {
			return true
		}
	}
	return false
}

// commitsBy returns the configuration by which a transition committed: on a
// leader the newest one from before it, because the next one is appended after
// the commit, in the same transition.
func (b *ledger) commitsBy(n *simNode) *configuration {
	all := n.core.configs
	k := len(all) - 1
	for n.core.role == Leader && k > 0 && all[k].index > n.before.last {
		k--
	}
	return &all[k].conf
}

// entered takes note of a configuration that was committed.
func (b *ledger) entered(s *sim, i Index, data []byte, by Term) {
	conf, err := decodeConfiguration(data)
	if err != nil {
		s.fail("entry %d: %v", i, err)
	}
	for _, m := range b.conf.conf.members {
		if conf.find(m.id) == nil {
			o := s.node(m.name)
			o.left = max(o.left, by)
		}
	}
	b.conf = configEntry{i, conf}
	s.members.committed++
	s.note(-1, "entry %d makes the members %s", i, simMemberList(&conf))
}

// changes checks a configuration that a leader has just appended (16).
func (b *ledger) changes(s *sim, n *simNode) {
	c := n.core
	newest := c.configs[len(c.configs)-1]
	if newest.index <= n.before.last || n.before.role != Leader {
		return
	}
	known := Index(len(b.committed))
	prev := c.configs[len(c.configs)-2]
	if prev.index > known {
		s.fail("16 leader %d of term %d appends a configuration at %d while no quorum has committed the one at %d", n.i, c.currentTerm, newest.index, prev.index)
	}
	if !intersect(&prev.conf, &newest.conf) {
		s.fail("16 leader %d appends configuration %s after %s, and their quorums need not overlap", n.i, simMemberList(&newest.conf), simMemberList(&prev.conf))
	}
	if !s.electable(n, &newest.conf) {
		return // a later leader is ahead of it
	}
	for _, o := range s.nodes {
		at, conf := s.newestConfig(o)
		if o == n || at.Index <= known || c.log.matches(at) || !s.electable(o, &conf) {
			continue
		}
		s.fail("16 leader %d of term %d appends configuration %s at %d while node %d has %s at %v; no quorum has committed either, and each may still be",
			n.i, c.currentTerm, simMemberList(&newest.conf), newest.index, o.i, simMemberList(&conf), at)
	}
}

// configsOf returns the configurations in a node's log, on disk if it is down.
func (s *sim) configsOf(o *simNode) (out []configEntry) {
	if o.core != nil && o.core.role != Dead {
		return o.core.configs
	}
	for _, d := range o.disk.configs() {
		conf, err := decodeConfiguration(d.data)
		if err != nil {
			s.fail("node %d has a bad configuration at %d: %v", o.i, d.index, err)
		}
		out = append(out, configEntry{d.index, conf})
	}
	return out
}

func (s *sim) newestConfig(o *simNode) (EntryID, configuration) {
	all := s.configsOf(o)
	if len(all) == 0 || all[len(all)-1].index == 0 {
		return EntryID{}, configuration{}
	}
	e := all[len(all)-1]
	at := EntryID{Index: e.index}
	if o.core != nil && o.core.role != Dead {
		at.Term = termOf(o.core, e.index)
	} else {
		at.Term, _ = o.disk.term(e.index)
	}
	return at, e.conf
}

// electable tells whether a node could still be elected with the log it has:
// whether a quorum has no newer one on its disks.
func (s *sim) electable(n *simNode, conf *configuration) bool {
	own := n.durableLast()
	if n.core != nil && n.core.role != Dead {
		own = n.core.log.lastID()
	}
	var self memberID
	if m := conf.byName(n.name); m != nil {
		self = m.id
	} else if n.core != nil {
		self = n.core.self
	}
	return simMayStand(s.configsOf(n), self) && simQuorum(conf, func(m *member) bool {
		o := s.owner(m)
		if o == nil {
			return false
		}
		has := o.durableLast()
		return own.Term > has.Term || own.Term == has.Term && own.Index >= has.Index
	})
}

// mayDecide returns the configurations that decide now, or will: the newest
// committed one, those after it in any log, and what each leads to.
func (s *sim) mayDecide() (out []configuration) {
	add := func(conf configuration) { out = append(out, conf, conf.entered()) }
	add(s.book.conf.conf)
	for _, o := range s.nodes {
		for _, e := range s.configsOf(o) {
			if e.index > s.book.conf.index {
				add(e.conf)
			}
		}
	}
	return out
}

func (s *sim) isMember(n *simNode) bool {
	if s.swarm.spares == 0 || s.book.conf.conf.byName(n.name) != nil {
		return true
	}
	l := s.highestLeader()
	return l != nil && l.core.configuration.byName(n.name) != nil
}

// chooseCore draws who lives on after a round of faults, so that every
// configuration that may decide keeps a quorum.
func (s *sim) chooseCore() {
	confs := s.mayDecide()
	for i := range s.core {
		s.core[i] = true
	}
	for _, i := range s.rng.Perm(len(s.nodes)) {
		s.core[i] = s.chance(0.4)
		for k := range confs {
			s.core[i] = s.core[i] || !simQuorum(&confs[k], func(m *member) bool {
				o := s.owner(m)
				return o != nil && s.core[o.i]
			})
		}
	}
}

// membersSettled tells whether the change that was under way is finished, if
// nobody whom it needs is dead.
func (s *sim) membersSettled(c *core) bool {
	for i := range c.configuration.members {
		if o := s.owner(&c.configuration.members[i]); o == nil || !s.core[o.i] {
			return true
		}
	}
	return !c.configuration.changing()
}

// newDisk gives a node that has left an empty disk: it comes back as a new one.
func (s *sim) newDisk(n *simNode) {
	s.note(n.i, "its disk is emptied")
	s.members.wiped++
	s.crash(n)
	n.disks++
	n.promised = time.Time{}
	n.disk, n.maxTermSent, n.led, n.snaps = newSimDisk(Entries{}), 0, nil, nodeSnapshots{}
	if n.wal != nil {
		n.wal = newSimWAL(s, n)
		n.wal.begin(s, Entries{})
	}
	s.restartAfter(n, s.someTimeouts(0.001, 1))
}

// changeMembers lets an operator ask a leader for a change or a transfer.
func (s *sim) changeMembers() {
	s.push(simEvent{at: s.now + 1 + time.Duration(s.rng.Int64N(2*int64(s.swarm.membersEvery))), kind: evMembers})
	n := s.highestLeader()
	if other := s.nodes[s.rng.IntN(len(s.nodes))]; n == nil || s.chance(0.2) && other.core != nil && other.core.role == Leader {
		n = other
	}
	c := n.core
	if c == nil || c.role == Dead || n.pausedUntil > s.now || !s.strikes(faultNemesis, 1, 1) {
		return
	}
	if s.chance(0.2) {
		s.transfer(n)
		return
	}
	list := c.configs[len(c.configs)-1].conf.list()
	what, target := s.drawTarget(n, list)
	if target == nil {
		return
	}
	_, err := s.begin(n).changeMembers(func([]Member) ([]Member, error) { return target, nil })
	var refused *MembershipError
	switch {
	case err == nil:
		s.members.begun++
		s.note(n.i, "%s: the members shall be %v", what, target)
	case errors.As(err, &refused):
		s.members.refused[refused.Reason]++
	default:
		s.fail("leader %d refuses to change members without a reason: %v", n.i, err)
	}
	s.end(n)
}

// transfer lets an operator hand leadership over, to anybody or to the best.
func (s *sim) transfer(n *simNode) {
	var to memberID
	if list := n.core.configuration.members; len(list) > 0 && s.chance(0.7) {
		to = list[s.rng.IntN(len(list))].id
	}
	var refused *TransferError
	err := s.begin(n).transferLeadership(to)
	switch {
	case err == nil:
		s.members.transfers++
	case !errors.As(err, &refused):
		s.fail("node %d does not transfer leadership, without a reason: %v", n.i, err)
	}
	s.end(n)
}

// drawTarget makes new members of the current ones, nil if that can't be done.
func (s *sim) drawTarget(n *simNode, list []Member) (what string, target []Member) {
	if len(list) == 0 {
		return "", nil
	}
	i := s.rng.IntN(len(list))
	switch s.rng.IntN(8) {
	case 0, 1:
		return "add a voter", s.withNew(n, list, false)
	case 2:
		return "add a learner", s.withNew(n, list, true)
	case 3:
		return "remove", slices.Delete(list, i, i+1)
	case 4:
		if list = s.withNew(n, list, false); list != nil {
			list = slices.Delete(list, i, i+1)
		}
		return "replace", list
	case 5, 6:
		list[i].Learner = !list[i].Learner
		return "promote or demote", list
	}
	for k := len(list) - 1; k >= 0; k-- {
		switch {
		case s.chance(0.3):
			list = slices.Delete(list, k, k+1)
		case s.chance(0.2):
			list[k].Learner = !list[k].Learner
		}
	}
	for range s.rng.IntN(3) {
		if more := s.withNew(n, list, s.chance(0.2)); more != nil {
			list = more
		}
	}
	return "change several", list
}

// withNew adds a node that is no member, nil if there is none. One that was a
// member mostly comes back with an empty disk, as soon as it may.
func (s *sim) withNew(n *simNode, list []Member, learner bool) []Member {
	o := s.nodes[s.rng.IntN(len(s.nodes))]
	if o == n || slices.ContainsFunc(list, func(m Member) bool { return m.ID == o.name }) {
		return nil
	}
	needed := slices.ContainsFunc(s.mayDecide(), func(conf configuration) bool { return conf.byName(o.name) != nil }) ||
		slices.ContainsFunc(s.nodes, func(o *simNode) bool { return o.disk.start.Index > 0 }) // who has nothing needs the whole log
	if !needed && o.disk.last() > 0 && s.chance(0.7) {
		s.newDisk(o)
	}
	return append(list, Member{ID: o.name, Addr: "sim:1", Learner: learner})
}
