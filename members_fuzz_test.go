package raft

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// Sequences of membership changes on cores, driven by bytes, against a model in
// which a configuration is two sets of voters, as bits, and a set of nodes
// decides or does not.

const fuzzNodes = 5

// voterSets is the model of a configuration.
type voterSets struct {
	now, then, learners uint // then: at the end of the way; learners: too
	joint               bool
}

func setsOf(conf *configuration) (v voterSets) {
	v.joint = conf.joint
	for i := range conf.members {
		m := &conf.members[i]
		bit := uint(1) << (m.name[0] - 'a')
		if votesNow(m) {
			v.now |= bit
		}
		switch {
		case votesThen(m):
			v.then |= bit
		case m.next != leaves:
			v.learners |= bit
		}
	}
	return v
}

func (v voterSets) decides(set uint) bool {
	most := func(of uint) bool { return 2*bits.OnesCount(set&of) > bits.OnesCount(of) }
	return most(v.now) && (!v.joint || most(v.then))
}

// overlap tells whether no two sets without a common node may both decide.
func (v voterSets) overlap(w voterSets) bool {
	const all = 1<<fuzzNodes - 1
	for set := uint(0); set <= all; set++ {
		if v.decides(set) && w.decides(all&^set) {
			return false
		}
	}
	return true
}

type fuzzVote struct {
	node int
	term Term
}

type fuzzMessage struct {
	from, to int
	toID     memberID
	m        message
	reply    *message
}

// fuzzCluster runs cores whose disks are quick and never lose anything.
type fuzzCluster struct {
	t         *testing.T
	cores     [fuzzNodes]*core
	boxes     [fuzzNodes]outbox
	net       []fuzzMessage
	now       time.Time
	votes     map[fuzzVote]memberID
	committed []Term // of entry i+1
	confs     map[EntryID]voterSets
	asked     map[EntryID]voterSets // what the change that an entry began shall lead to
	goal      voterSets
	trail     []string
}

func newFuzzCluster(t *testing.T) *fuzzCluster {
	f := &fuzzCluster{t: t, now: simEpoch, votes: map[fuzzVote]memberID{}, confs: map[EntryID]voterSets{}, asked: map[EntryID]voterSets{}}
	first := testCore(t, 1, 3)
	f.confs[EntryID{1, 0}] = setsOf(&first.configuration)
	f.goal = f.confs[EntryID{1, 0}]
	for i := range f.cores {
		c := testCore(t, memberID(i+1), 3)
		if i >= 3 { // it waits to be added
			rec := Recovered{}
			c = newCore(0, c.limits, rec, configuration{}, rand.New(rand.NewPCG(uint64(i), 1)), simEpoch)
		}
		c.limits.preVote = true
		c.limits.maxFrameBytes = 1 << 10
		c.name = NodeID(string(rune('a' + i)))
		f.cores[i] = c
		f.step(i, func(*core) {})
	}
	return f
}

func (f *fuzzCluster) fail(format string, args ...any) {
	f.t.Helper()
	for _, line := range f.trail[max(0, len(f.trail)-60):] {
		f.t.Log(line)
	}
	f.t.Fatalf(format, args...)
}

// step performs one transition and what follows from it, and checks it.
func (f *fuzzCluster) step(i int, do func(c *core)) {
	f.t.Helper()
	c := f.cores[i]
	for first := true; ; first = false {
		before, confs := c.snapshot(), slices.Clone(c.configs)
		c.now = f.now
		if first {
			do(c)
		} else {
			c.persisted(c.lsn, 0)
		}
		out := c.finish()
		if err := c.checkStep(before); err != nil {
			f.fail("node %s: %v", c.name, err)
		}
		for _, e := range out.events {
			f.trail = append(f.trail, fmt.Sprintf("[%s] %v", c.name, e))
		}
		f.check(i, before, confs)
		f.boxes[i].add(out.msgs)
		if out.save == nil {
			break
		}
	}
	for _, m := range f.boxes[i].release(nil, c.durableLSN, c.currentTerm, c.hardLSN) {
		if m.token != nil {
			q := m.token.(fuzzMessage)
			q.reply = &m
			f.net = append(f.net, q)
		} else if to := c.configuration.find(m.to); to != nil {
			f.net = append(f.net, fuzzMessage{from: i, to: int(to.name[0] - 'a'), toID: m.to, m: m})
		}
	}
}

// check compares a transition with the model.
func (f *fuzzCluster) check(i int, before coreSnapshot, confs []configEntry) {
	f.t.Helper()
	c := f.cores[i]
	if c.votedFor != 0 {
		k := fuzzVote{i, c.currentTerm}
		if old := f.votes[k]; old != 0 && old != c.votedFor {
			f.fail("node %s votes twice in term %d", c.name, c.currentTerm)
		}
		f.votes[k] = c.votedFor
	}
	force := setsOf(&c.configuration)
	if c.role == Leader && before.role != Leader {
		set := uint(0)
		for o := range f.cores {
			if f.votes[fuzzVote{o, c.currentTerm}] == c.self {
				set |= 1 << o
			}
		}
		if !force.decides(set) {
			f.fail("node %s leads term %d with the votes of %05b, which decide nothing in %+v", c.name, c.currentTerm, set, force)
		}
	}
	newest := c.configs[len(c.configs)-1]
	if at := confs[len(confs)-1]; c.role == Leader && newest.index > before.last && before.role == Leader {
		force = setsOf(&at.conf)
		if v := setsOf(&newest.conf); !v.overlap(force) {
			f.fail("leader %s goes from %+v to %+v: two sets without a common node may decide", c.name, force, v)
		}
		if len(c.configs) > 1 && c.configs[len(c.configs)-2].index > Index(len(f.committed)) && c.configs[len(c.configs)-2].index > c.commitIndex {
			f.fail("leader %s appends a second configuration before the first is committed", c.name)
		}
	}
	for _, e := range c.configs {
		if t, ok := c.log.term(e.index); ok && e.index > 0 {
			f.confs[EntryID{e.index, t}] = setsOf(&e.conf)
		}
	}
	for k := before.commit + 1; k <= c.commitIndex; k++ {
		t, _ := c.log.term(k)
		if k <= Index(len(f.committed)) {
			if f.committed[k-1] != t {
				f.fail("node %s commits entry %d of term %d; it was committed with term %d", c.name, k, t, f.committed[k-1])
			}
			continue
		}
		f.committed = append(f.committed, t)
		f.commit(EntryID{k, t})
		set := uint(0)
		for o, other := range f.cores {
			if other.log.last >= k && other.log.matches(EntryID{k, t}) && other.durableIndex >= k {
				set |= 1 << o
			}
		}
		if !force.decides(set) {
			f.fail("node %s commits entry %d, which %05b have; they decide nothing in %+v", c.name, k, set, force)
		}
	}
}

// commit follows the committed configurations: each leads to what was asked
// for last, and the voters change through a joint one only.
func (f *fuzzCluster) commit(id EntryID) {
	f.t.Helper()
	v, ok := f.confs[id]
	if !ok || id.Index == 1 {
		return
	}
	prev := f.newestBefore(id.Index)
	if goal, ok := f.asked[id]; ok {
		f.goal = goal
	}
	switch {
	case v.then != f.goal.then || v.learners != f.goal.learners:
		f.fail("entry %v leads to voters %05b and learners %05b, asked for were %05b and %05b", id, v.then, v.learners, f.goal.then, f.goal.learners)
	case !prev.joint && v.now != prev.now:
		f.fail("entry %v changes the voters from %05b to %05b without a joint configuration", id, prev.now, v.now)
	case prev.joint && (v.joint || v.now != prev.then):
		f.fail("after the joint configuration %+v comes %+v", prev, v)
	}
}

func (f *fuzzCluster) newestBefore(i Index) (v voterSets) {
	for k := i - 1; k > 0; k-- {
		if v, ok := f.confs[EntryID{k, f.committed[k-1]}]; ok {
			return v
		}
	}
	f.fail("no configuration before entry %d", i)
	return v
}

func (f *fuzzCluster) deliver(q fuzzMessage) {
	f.t.Helper()
	switch {
	case q.reply == nil && q.m.vote != nil:
		f.step(q.to, func(c *core) { c.onVoteRequest(q.m.vote, q) })
	case q.reply == nil:
		f.step(q.to, func(c *core) { c.onAppendRequest(q.m.append, q) })
	case q.m.vote != nil:
		f.step(q.from, func(c *core) { c.onVoteReply(q.toID, q.m.vote, q.reply.voteReply) })
	default:
		f.step(q.from, func(c *core) { c.onAppendReply(q.toID, q.m.append, q.reply.appendReply) })
	}
}

func (f *fuzzCluster) leader() (best int) {
	best = -1
	for i, c := range f.cores {
		if c.role == Leader && (best < 0 || c.currentTerm > f.cores[best].currentTerm) {
			best = i
		}
	}
	return best
}

// change asks a leader for members, two bits a node: 1 voter, 2 learner.
func (f *fuzzCluster) change(i int, want uint) {
	f.t.Helper()
	var list []Member
	var goal voterSets
	for k := range fuzzNodes {
		switch want >> (2 * k) & 3 {
		case 1:
			list = append(list, Member{ID: NodeID(string(rune('a' + k)))})
			goal.then |= 1 << k
		case 2:
			list = append(list, Member{ID: NodeID(string(rune('a' + k))), Learner: true})
			goal.learners |= 1 << k
		}
	}
	f.step(i, func(c *core) {
		id, err := c.changeMembers(func([]Member) ([]Member, error) { return list, nil })
		if err == nil {
			f.asked[id] = goal
		}
	})
}

// act performs one instruction.
func (f *fuzzCluster) act(what, arg byte) {
	f.t.Helper()
	node := int(arg) % fuzzNodes
	take := func() (q fuzzMessage, ok bool) {
		if len(f.net) == 0 {
			return q, false
		}
		k := int(arg) % len(f.net)
		q = f.net[k]
		f.net = slices.Delete(f.net, k, k+1)
		return q, true
	}
	switch what % 12 {
	case 0, 1, 2: // the low bits choose among 1024 memberships
		if l := f.leader(); l >= 0 {
			f.change(l, uint(what/12)<<8|uint(arg))
		}
	case 3:
		take() // lost
	case 4: // twice
		if len(f.net) > 0 {
			f.deliver(f.net[int(arg)%len(f.net)])
		}
	case 5:
		f.now = f.now.Add(time.Duration(arg) * 10 * time.Millisecond)
		f.step(node, func(c *core) {
			if !c.electionDeadline.IsZero() && c.role != Leader {
				c.electionDeadline = c.now
				c.tick()
			}
		})
	case 6:
		if l := f.leader(); l >= 0 {
			f.now = f.now.Add(100 * time.Millisecond)
			f.step(l, (*core).heartbeat)
		}
	case 7:
		if l := f.leader(); l >= 0 {
			f.step(l, func(c *core) {
				var b entryBuilder
				b.add(entryCommand, []byte{arg})
				c.propose(&b)
			})
		}
	case 8: // one cuts the others off by campaigning at once, as after a transfer
		f.step(node, func(c *core) {
			if c.role == Follower && c.configuration.voter(c.self) {
				c.becomeCandidate(ReasonTransfer)
			}
		})
	default:
		for range 1 + arg%16 {
			if q, ok := take(); ok {
				f.deliver(q)
			}
		}
	}
}

// settle lets everything arrive until a leader has finished the change.
func (f *fuzzCluster) settle() {
	f.t.Helper()
	for range 600 {
		for k := 0; len(f.net) > 0 && k < 200; k++ {
			q := f.net[0]
			f.net = f.net[1:]
			f.deliver(q)
		}
		l := f.leader()
		if l >= 0 {
			c := f.cores[l]
			if c.commitIndex == c.log.last && c.commitIndex >= c.firstOfTerm && !c.configuration.changing() && c.configuration.voter(c.self) {
				return
			}
		}
		f.now = f.now.Add(100 * time.Millisecond)
		for i, c := range f.cores {
			if c.role == Leader {
				f.step(i, (*core).heartbeat)
			} else {
				f.step(i, (*core).tick)
			}
		}
	}
	for _, c := range f.cores {
		f.t.Logf("%s: %v term %d, log to %v, commit %d, %+v", c.name, c.role, c.currentTerm, c.log.lastID(), c.commitIndex, setsOf(&c.configuration))
	}
	f.fail("the cluster does not come to rest")
}

func runMembership(t *testing.T, program []byte) (changes int) {
	f := newFuzzCluster(t)
	f.settle()
	for k := 0; k+1 < len(program) && k < 400; k += 2 {
		f.act(program[k], program[k+1])
	}
	f.settle()
	if v := setsOf(&f.cores[f.leader()].configuration); v.now != f.goal.then {
		f.fail("at rest the voters are %05b, asked for were %05b", v.now, f.goal.then)
	}
	return len(f.asked)
}

func FuzzMembership(f *testing.F) {
	for seed := range uint64(8) {
		f.Add(randomProgram(seed))
	}
	f.Fuzz(func(t *testing.T, program []byte) { runMembership(t, program) })
}

func randomProgram(seed uint64) []byte {
	dice := rand.New(rand.NewPCG(seed, 11))
	b := make([]byte, 2*(50+dice.IntN(150)))
	for i := range b {
		b[i] = byte(dice.Uint32())
	}
	return b
}

// TestMembershipSequences runs sequences that nobody chose.
func TestMembershipSequences(t *testing.T) {
	changes := 0
	for seed := uint64(1); seed <= 300; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { changes += runMembership(t, randomProgram(seed)) })
		if t.Failed() {
			break
		}
	}
	if changes < 300 {
		t.Errorf("%d changes were begun in 300 sequences", changes)
	}
	t.Logf("%d changes begun", changes)
}
