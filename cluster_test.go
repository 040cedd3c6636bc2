package raft

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// testCluster is a few cores with their outboxes and storages, and the
// messages between them. Nothing happens by itself: a test or a script makes
// one event happen at a time and reads what came of it. After every event the
// properties of Figure 3 are checked across the cluster. Where the simulator
// looks for what nobody thought of, this tells one story.
type testCluster struct {
	t     *testing.T
	conf  configuration
	nodes []*testNode
	net   []*testMessage // under way, oldest first
	cuts  [][2]memberID  // from and to: what is sent there is lost
	now   time.Time
	trace strings.Builder // what happened, a line each
	quiet bool            // leaves trace empty

	leaders   map[Term]memberID
	committed []Term // the terms of committed entries, from entry 1 on
}

type testNode struct {
	id     memberID
	name   string
	limits limits
	seed   uint64
	disk   *MemoryStorage // survives a crash as far as it was flushed
	slow   bool           // the disk flushes only when told to
	core   *core          // nil while down
	box    outbox
	tc     *testCluster
	newest *SnapshotMeta // its newest snapshot, durable
}

// testMessage is a request or the reply to one.
type testMessage struct {
	from, to memberID
	req      message  // the request itself, or the one that is answered
	reply    *message // nil for a request
	snapshot *testSnapshot
}

// testSnapshot is a snapshot on its way to a follower, or the answer to it.
type testSnapshot struct {
	request snapshotRequest
	args    snapshotArgs
	done    snapshotReply
}

func newTestCluster(t *testing.T, names ...string) *testCluster {
	tc := &testCluster{t: t, now: simEpoch, leaders: map[Term]memberID{}}
	for i, name := range names {
		tc.conf.members = append(tc.conf.members, member{id: memberID(i + 1), name: NodeID(name)})
	}
	for i, name := range names {
		n := &testNode{id: memberID(i + 1), name: name, seed: uint64(i + 1), limits: testCore(t, 1, 1).limits, tc: tc}
		n.limits.maxFrameBytes = 1 << 20
		tc.nodes = append(tc.nodes, n)
		tc.install(n, HardState{})
	}
	t.Cleanup(func() {
		if t.Failed() && tc.trace.Len() > 0 {
			lines := strings.Split(tc.trace.String(), "\n")
			t.Logf("what happened last:\n%s", strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
	return tc
}

// install starts n with a disk that holds hard, entry 1 and, from entry 2 on,
// no-ops of the given terms.
func (tc *testCluster) install(n *testNode, hard HardState, terms ...Term) {
	n.disk = NewMemoryStorage()
	if _, err := n.disk.Open(context.Background(), Identity{}); err != nil {
		tc.t.Fatal(err)
	}
	entries := []Entries{makeEntry(entryConfiguration, EntryID{1, 0}, time.Time{}, tc.conf.encode())}
	for i, term := range terms {
		entries = append(entries, makeEntry(entryNoop, EntryID{Index(i + 2), term}, simEpoch, nil))
	}
	n.disk.Append(Save{LSN: 1, HardState: &hard, Entries: entries})
	n.disk.Flush()
	n.disk.Close()
	tc.boot(n)
}

// boot starts a run of n from what its disk holds.
func (tc *testCluster) boot(n *testNode) {
	rec, err := n.disk.Open(context.Background(), Identity{})
	if err != nil {
		tc.t.Fatal(err)
	}
	conf, err := decodeConfiguration(rec.Config)
	if err != nil {
		tc.t.Fatal(err)
	}
	n.box = outbox{}
	n.core = newCore(n.id, n.limits, rec, conf, rand.New(rand.NewPCG(n.seed, 1)), tc.now)
	n.core.name = NodeID(n.name)
	tc.step(n, func(c *core) {
		if n.newest != nil {
			c.restored(n.newest)
		}
	})
}

// crash ends a run: what was not flushed is lost, and so is every connection.
func (tc *testCluster) crash(n *testNode) {
	n.core = nil
	n.disk.Close()
	tc.net = slices.DeleteFunc(tc.net, func(m *testMessage) bool {
		return m.reply != nil && m.to == n.id || m.reply == nil && m.from == n.id
	})
}

func (tc *testCluster) node(name string) *testNode {
	for _, n := range tc.nodes {
		if n.name == name {
			return n
		}
	}
	tc.t.Fatalf("no node is called %q", name)
	return nil
}

func (tc *testCluster) name(id memberID) string { return tc.nodes[id-1].name }

func (tc *testCluster) say(format string, args ...any) {
	if tc.quiet {
		return
	}
	fmt.Fprintf(&tc.trace, format+"\n", args...)
}

// step performs one transition of n's core and hands on what it wants done.
func (tc *testCluster) step(n *testNode, f func(*core)) {
	c := n.core
	if c == nil {
		tc.t.Fatalf("%s is down", n.name)
	}
	c.now = tc.now
	before := c.snapshot()
	f(c)
	out := c.finish()
	if err := c.checkStep(before); err != nil {
		tc.t.Fatalf("%s: %v", n.name, err)
	}
	for _, e := range out.events {
		if e.Kind != EventElectionTimer && e.Kind != EventStarted {
			tc.say("%s %s", n.name, e)
		}
	}
	if c.commitIndex > before.commit {
		tc.say("%s commits up to %d", n.name, c.commitIndex)
	}
	if out.save != nil {
		n.disk.Append(*out.save)
	}
	n.box.add(out.msgs)
	tc.release(n)
	for _, to := range out.hangups {
		tc.say("%s hangs up on %s", n.name, tc.name(to))
		tc.breakConnection(n.id, to)
	}
	tc.checkProperties(n)
	for _, q := range out.snapshots {
		m := &testMessage{from: n.id, to: q.to, snapshot: &testSnapshot{request: q, args: snapshotArgs{Term: c.currentTerm, Leader: c.self, Meta: *n.newest}}}
		if !tc.isCut(m.from, m.to) {
			tc.net = append(tc.net, m)
		}
		tc.say("%s", tc.describe(m))
	}
	for _, q := range out.reads {
		e, err := n.disk.Read(q.lo, q.hi, q.maxBytes)
		if err != nil {
			tc.t.Fatal(err)
		}
		tc.step(n, func(c *core) { c.entriesRead(q, e) })
	}
	if !n.slow && c.lsn > c.durableLSN {
		tc.flush(n)
	}
}

func (tc *testCluster) flush(n *testNode) {
	lsn, err := n.disk.Flush()
	if err != nil {
		tc.t.Fatal(err)
	}
	tc.step(n, func(c *core) { c.persisted(lsn, 0) })
}

// release sends what the outbox lets go.
func (tc *testCluster) release(n *testNode) {
	for _, m := range n.box.release(nil, n.core.durableLSN, n.core.currentTerm, n.core.hardLSN) {
		sent := &testMessage{from: n.id, to: m.to, req: m}
		if m.token != nil {
			sent.req, sent.reply = m.token.(*testMessage).req, &m
		}
		if tc.isCut(sent.from, sent.to) {
			tc.say("%s  (lost)", tc.describe(sent))
			continue
		}
		tc.say("%s", tc.describe(sent))
		tc.net = append(tc.net, sent)
	}
}

const downSuffix = " is down: lost"

// deliver hands a message to its receiver.
func (tc *testCluster) deliver(m *testMessage) {
	n := tc.nodes[m.to-1]
	if n.core == nil {
		tc.say("%s%s", n.name, downSuffix)
		return
	}
	tc.step(n, func(c *core) {
		switch s := m.snapshot; {
		case s != nil && m.reply == nil:
			tc.receive(n, c, m)
		case s != nil && s.done.Done:
			c.snapshotSent(s.request, s.args.Meta.Last, nil)
		case s != nil:
			c.stepDownFor(m.from, s.done.Term)
			c.snapshotSent(s.request, EntryID{}, errors.New("refused"))
		case m.reply == nil && m.req.vote != nil:
			c.onVoteRequest(m.req.vote, m)
		case m.reply == nil:
			c.onAppendRequest(m.req.append, m)
		case m.req.vote != nil:
			c.onVoteReply(m.from, m.req.vote, m.reply.voteReply)
		default:
			c.onAppendReply(m.from, m.req.append, m.reply.appendReply)
		}
	})
}

// takeSnapshot stores a snapshot of what n has committed. The log goes with it.
func (tc *testCluster) takeSnapshot(n *testNode) {
	tc.step(n, func(c *core) {
		t, _ := c.log.term(c.commitIndex)
		meta := SnapshotMeta{Last: EntryID{c.commitIndex, t}, Time: simEpoch}
		for _, e := range c.configs {
			if e.index <= c.commitIndex {
				meta.ConfigIndex, meta.Config = e.index, e.conf.encode()
			}
		}
		if n.newest == nil || meta.Last.Index > n.newest.Last.Index {
			n.newest = &meta
			c.snapshotTaken(meta.Last, meta.Last.Index)
		}
	})
}

// receive takes a snapshot, all in one block, and answers.
func (tc *testCluster) receive(n *testNode, c *core, m *testMessage) {
	s := *m.snapshot
	if c.onInstallSnapshot(&s.args, &s.done) {
		if n.newest == nil || s.args.Meta.Last.Index > n.newest.Last.Index {
			n.newest = &s.args.Meta
		}
		c.installSnapshot(&s.args.Meta)
		s.done.Done = true
	}
	if !tc.isCut(m.to, m.from) {
		tc.net = append(tc.net, &testMessage{from: m.to, to: m.from, reply: &message{}, snapshot: &s})
	}
}

// between returns what is under way from one node to another, oldest first.
func (tc *testCluster) between(from, to memberID) (out []*testMessage) {
	for _, m := range tc.net {
		if m.from == from && m.to == to {
			out = append(out, m)
		}
	}
	return out
}

// take removes a message from the network.
func (tc *testCluster) take(m *testMessage) *testMessage {
	tc.net = slices.DeleteFunc(tc.net, func(o *testMessage) bool { return o == m })
	return m
}

// forget loses the appends from one node to another and their replies: their
// connection is closed.
func (tc *testCluster) forget(from, to memberID) {
	tc.net = slices.DeleteFunc(tc.net, func(m *testMessage) bool {
		a := m.req.append
		return (m.snapshot != nil || a != nil && !a.Heartbeat) && (m.reply == nil && m.from == from && m.to == to || m.reply != nil && m.from == to && m.to == from)
	})
}

// breakConnection closes the append connection from one node to another, and
// the sender finds out: nothing unanswered on it will be answered.
func (tc *testCluster) breakConnection(from, to memberID) {
	tc.forget(from, to)
	c := tc.nodes[from-1].core
	p := c.progressOf(to)
	if p == nil {
		return
	}
	if p.state == snapshotting {
		tc.step(tc.nodes[from-1], func(c *core) {
			c.snapshotSent(snapshotRequest{to, c.currentTerm}, EntryID{}, errors.New("broken"))
		})
	}
	for _, a := range slices.Clone(p.inflight) {
		tc.step(tc.nodes[from-1], func(c *core) { c.onAppendFailed(to, &appendArgs{Term: c.currentTerm, Seq: a.seq}) })
	}
}

// settle delivers everything, in the order sent, until nothing is under way.
// It returns how many messages that were.
func (tc *testCluster) settle() (count int) {
	for len(tc.net) > 0 {
		if count++; count > 100000 {
			tc.t.Fatal("messages go round for ever")
		}
		tc.deliver(tc.take(tc.net[0]))
	}
	return count
}

// run lets time pass: timers and heartbeats fire when they are due, and every
// message arrives at once.
func (tc *testCluster) run(d time.Duration) {
	const grain = 10 * time.Millisecond
	for end := tc.now.Add(d); tc.now.Before(end); {
		tc.now = tc.now.Add(grain)
		for _, n := range tc.nodes {
			if n.core == nil {
				continue
			}
			if n.core.role == Leader && tc.now.Sub(simEpoch)%n.limits.heartbeatInterval < grain {
				tc.step(n, (*core).heartbeat)
			}
			if !tc.now.Before(n.core.electionDeadline) {
				tc.step(n, (*core).tick)
			}
		}
		tc.settle()
	}
}

// timeout lets the clock reach n's election deadline.
func (tc *testCluster) timeout(n *testNode) {
	if tc.now.Before(n.core.electionDeadline) {
		tc.now = n.core.electionDeadline
	}
	tc.step(n, (*core).tick)
}

// elect makes n campaign and delivers only what concerns the election.
func (tc *testCluster) elect(n *testNode) {
	tc.timeout(n)
	for {
		i := slices.IndexFunc(tc.net, func(m *testMessage) bool { return m.req.vote != nil && m.req.vote.Candidate == n.id })
		if i < 0 {
			break
		}
		tc.deliver(tc.take(tc.net[i]))
	}
	if n.core.role != Leader {
		tc.t.Fatalf("%s is %s after its campaign", n.name, n.core.role)
	}
}

func (tc *testCluster) propose(n *testNode, data string) {
	tc.step(n, func(c *core) {
		var b entryBuilder
		b.add(entryCommand, []byte(data))
		if _, ok := c.propose(&b); !ok {
			tc.t.Fatalf("%s does not lead", n.name)
		}
	})
}

func (tc *testCluster) cut(from, to memberID) {
	tc.cuts = append(tc.cuts, [2]memberID{from, to})
	tc.net = slices.DeleteFunc(tc.net, func(m *testMessage) bool { return m.from == from && m.to == to })
}

func (tc *testCluster) isCut(from, to memberID) bool {
	return slices.Contains(tc.cuts, [2]memberID{from, to})
}

// leader returns who leads in the highest term.
func (tc *testCluster) leader() (best *testNode) {
	for _, n := range tc.nodes {
		if n.core != nil && n.core.role == Leader && (best == nil || n.core.currentTerm > best.core.currentTerm) {
			best = n
		}
	}
	return best
}

// terms returns the terms of n's log, from entry 1 on; those that a snapshot has
// replaced as they were committed.
func (n *testNode) terms() (out []Term) {
	start := n.core.log.start.Index
	if start > 1 {
		out = append(out, n.tc.committed[:start-1]...)
	}
	for i := max(start, 1); i <= n.core.log.last; i++ {
		t, _ := n.core.log.term(i)
		out = append(out, t)
	}
	return out
}

// checkProperties checks Figure 3 across the cluster, after a step of n.
func (tc *testCluster) checkProperties(n *testNode) {
	c := n.core
	if c.role == Leader { // Election Safety, Leader Completeness
		if other, ok := tc.leaders[c.currentTerm]; ok && other != n.id {
			tc.t.Fatalf("%s and %s lead term %d", tc.name(other), n.name, c.currentTerm)
		} else if !ok {
			tc.leaders[c.currentTerm] = n.id
			if own := n.terms(); len(own) < len(tc.committed) || !slices.Equal(own[:len(tc.committed)], tc.committed) {
				tc.t.Fatalf("%s leads term %d with log %v, but %v is committed", n.name, c.currentTerm, own, tc.committed)
			}
		}
	}
	own := n.terms()
	for i := range int(c.commitIndex) { // State Machine Safety
		if i == len(tc.committed) {
			tc.committed = append(tc.committed, own[i])
		} else if tc.committed[i] != own[i] {
			tc.t.Fatalf("%s commits entry %d of term %d, but that of term %d is committed", n.name, i+1, own[i], tc.committed[i])
		}
	}
	for _, o := range tc.nodes { // Log Matching
		if o.core == nil {
			continue
		}
		theirs := o.terms()
		for i := min(len(own), len(theirs)) - 1; i >= 0; i-- {
			if own[i] != theirs[i] {
				continue
			}
			if !slices.Equal(own[:i], theirs[:i]) {
				tc.t.Fatalf("%s has %v and %s has %v: the logs agree at %d, but not before", n.name, own, o.name, theirs, i+1)
			}
			break
		}
	}
}

// describe returns a message as a line.
func (tc *testCluster) describe(m *testMessage) string {
	if tc.quiet {
		return ""
	}
	var what string
	switch v, a := m.req.vote, m.req.append; {
	case m.snapshot != nil:
		what = fmt.Sprintf("InstallSnapshot up to %v", m.snapshot.args.Meta.Last)
	case m.reply == nil && v != nil:
		what = fmt.Sprintf("RequestVote term %d, last entry %v", v.Term, v.Last)
		if v.PreVote {
			what = fmt.Sprintf("would you vote for me in term %d? last entry %v", v.Term, v.Last)
		}
	case m.reply == nil && a.Heartbeat:
		what = fmt.Sprintf("heartbeat term %d, after %v, commit %d", a.Term, a.Prev, a.Commit)
	case m.reply == nil:
		what = fmt.Sprintf("AppendEntries term %d, after %v: %s, commit %d", a.Term, a.Prev, describeEntries(a.Entries), a.Commit)
	case v != nil:
		what = fmt.Sprintf("%s, term %d", map[bool]string{true: "yes", false: "no"}[m.reply.voteReply.Granted], m.reply.voteReply.Term)
	default:
		what = describeAnswer(a, m.reply.appendReply)
	}
	return fmt.Sprintf("%s -> %s  %s", tc.name(m.from), tc.name(m.to), what)
}

func describeEntries(runs []Entries) string {
	var out []string
	for _, e := range runs {
		for i := range e.Len() {
			out = append(out, EntryID{e.First() + Index(i), e.term(i)}.String())
		}
	}
	switch len(out) {
	case 0:
		return "nothing"
	case 1, 2:
		return strings.Join(out, ", ")
	}
	return out[0] + " to " + out[len(out)-1]
}

func describeAnswer(a *appendArgs, r *appendReply) string {
	switch {
	case r.Success && a.Heartbeat:
		return fmt.Sprintf("heard, term %d", r.Term)
	case r.Success:
		return fmt.Sprintf("has %d, term %d", a.lastIndex(), r.Term)
	case r.Term > a.Term:
		return fmt.Sprintf("refused, term %d", r.Term)
	}
	return fmt.Sprintf("refused, term %d: try after %v", r.Term, r.Hint)
}

// table shows the state of every node.
func (tc *testCluster) table(nodes []*testNode) string {
	var b strings.Builder
	width := len("node")
	for _, n := range nodes {
		width = max(width, len(n.name))
	}
	fmt.Fprintf(&b, "%-*s  role       term  %-*s  log\n", width, "node", width, "vote")
	for _, n := range nodes {
		if n.core == nil {
			fmt.Fprintf(&b, "%-*s  down\n", width, n.name)
			continue
		}
		c, vote := n.core, "-"
		if c.votedFor != 0 {
			vote = tc.name(c.votedFor)
		}
		fmt.Fprintf(&b, "%-*s  %-9s  %4d  %-*s ", width, n.name, c.role, c.currentTerm, width, vote)
		for i, t := range n.terms() {
			if Index(i+1) > c.durableIndex {
				fmt.Fprintf(&b, " (%d)", t)
			} else {
				fmt.Fprintf(&b, " %d", t)
			}
			if Index(i+1) == c.commitIndex {
				b.WriteString(" |")
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}
