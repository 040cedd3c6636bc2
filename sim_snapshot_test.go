package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
)

// Snapshots in the simulator: nodes store the state of their machines, drop the
// log before it, and send it to followers in blocks that are lost, doubled and
// late. What stores and receives them is the storage of the node and the
// incomingSnapshot of a server; what moves the blocks is made up here.

// simSnapshots counts what happened to snapshots.
type simSnapshots struct {
	Taken     int
	Failed    int // attempts to take one that the disk spoiled
	Sent      int // transfers that ended well
	Broken    int // blocks that were not answered
	Resumed   int // transfers that went on behind what the follower had
	GivenUp   int // transfers without an end
	Received  int // complete and durable at the receiver
	Replaced  int // logs replaced
	Stale     int // durable, and of no use any more when they were to be installed
	Restored  int // states restored from one that replaced the log
	Restarts  int // starts from one
	Fallbacks int // starts from an older one, because the newest is damaged
}

func (c *simSnapshots) add(o simSnapshots) {
	c.Taken += o.Taken
	c.Failed += o.Failed
	c.Sent += o.Sent
	c.Broken += o.Broken
	c.Resumed += o.Resumed
	c.GivenUp += o.GivenUp
	c.Received += o.Received
	c.Replaced += o.Replaced
	c.Stale += o.Stale
	c.Restored += o.Restored
	c.Restarts += o.Restarts
	c.Fallbacks += o.Fallbacks
}

// nodeSnapshots is what a node of the simulator has to do with snapshots.
type nodeSnapshots struct {
	newest SnapshotMeta              // of those that are durable for certain
	tried  map[[16]byte]SnapshotMeta // those that may be there, complete

	// Of the current run.
	capturing bool
	incoming  *incomingSnapshot
	late      *func() // an install that is to come; nothing is stored before it
	replies   []simBlockReply
	lastTime  time.Time // of the newest entry that the state includes
	config    configAt  // the newest configuration that the state includes
}

// simBlockReply is the answer to a block that waits for the disk.
type simBlockReply struct {
	needs LSN
	call  *simCall
	reply *snapshotReply
}

// stored notes that a snapshot is durable.
func (k *nodeSnapshots) stored(meta SnapshotMeta) {
	if meta.Last.Index > k.newest.Last.Index {
		k.newest = meta
	}
}

// covers tells whether entry i is part of a durable snapshot.
func (k *nodeSnapshots) covers(i Index) bool { return i <= k.newest.Last.Index }

// durableLast returns the last entry of the log that a start would go on with.
func (n *simNode) durableLast() EntryID {
	snapshot := n.snaps.newest.Last
	if t, _ := n.disk.term(snapshot.Index); snapshot.Index > 0 && t != snapshot.Term && snapshot.Index > n.disk.start.Index {
		return snapshot
	}
	t, _ := n.disk.term(n.disk.last())
	return EntryID{n.disk.last(), t}
}

// begin begins a run.
func (k *nodeSnapshots) begin() {
	if k.tried == nil {
		k.tried = map[[16]byte]SnapshotMeta{}
	}
	*k = nodeSnapshots{newest: k.newest, tried: k.tried, incoming: &incomingSnapshot{}}
}

func (n *simNode) storage() Storage {
	if n.wal != nil {
		return n.wal.storage
	}
	return n.disk
}

// later does something at a node, unless it has crashed by then.
func (s *sim) later(n *simNode, d time.Duration, f func()) {
	s.push(simEvent{at: s.now + d, kind: evThen, node: n.i, run: n.run, then: f})
}

// diskTime draws how long something takes on a disk.
func (s *sim) diskTime(n *simNode) time.Duration {
	if !s.faulty {
		return s.swarm.timeout / 1000
	}
	d := time.Duration(s.rng.Int64N(int64(2*s.swarm.flushMean) + 1))
	if s.strikes(faultSnapshotSlow, n.i, s.swarm.snapshotSlowP) {
		d += s.someTimeouts(0.05, 5)
	}
	return d
}

// snapshotIO changes the snapshots on a disk. It returns errSimPower if the
// power failed meanwhile, and any other error if the disk did.
func (s *sim) snapshotIO(n *simNode, f func() error) error {
	w := n.wal
	s.makeSpace(n)
	fails := s.strikes(faultSnapshotFail, n.i, s.swarm.snapshotFailP)
	switch {
	case w == nil && fails:
		return errSimDisk
	case w == nil:
		return f()
	case fails:
		w.failSoon(errSimDisk, 8)
	case s.strikes(faultPower, n.i, s.swarm.boundaryP*0.02):
		w.failSoon(errSimPower, 8)
	}
	err := f()
	if err != nil && !w.fired && !s.mayFail(n, err) && !(w.full && vfs.IsNoSpace(err)) {
		s.fail("node %d can't store a snapshot on a sound disk: %v", n.i, err)
	}
	if w.fired && errors.Is(w.err, errSimPower) {
		err = errSimPower // also if whoever was told went on
	}
	w.ops, w.fired = 0, false
	return err
}

// takeSnapshot captures the state of a node as a server's applier does, and
// stores half of it; the rest follows later.
func (s *sim) takeSnapshot(n *simNode) {
	c, k := n.core, &n.snaps
	if c == nil || c.role == Dead || c.applyFailed || n.pausedUntil > s.now || k.capturing || n.wait.applied <= c.newestSnapshot.Index {
		return
	}
	meta := SnapshotMeta{Last: EntryID{n.wait.applied, n.wait.term}, Time: k.lastTime, ConfigIndex: k.config.index, Config: k.config.data}
	binary.LittleEndian.PutUint64(meta.ID[:], s.rng.Uint64())
	meta.ID[15] = byte(n.i + 1)
	state := n.sessions.encode(nil)
	meta.Sessions = uint64(len(state))
	state = append(state, n.machine.encode(meta.Last.Index, s.rng.IntN(s.swarm.stateMax+1))...)
	var w SnapshotWriter
	err := s.snapshotIO(n, func() (err error) {
		if w, err = n.storage().CreateSnapshot(meta); err == nil {
			_, err = w.Write(state[:len(state)/2])
		}
		return err
	})
	if errors.Is(err, errSimPower) {
		s.crashAndRestart(n)
		return
	}
	if err != nil {
		s.snaps.Failed++
		if w != nil {
			w.Abort()
		}
		return
	}
	k.capturing = true
	s.note(n.i, "takes a snapshot up to %v", meta.Last)
	s.later(n, s.diskTime(n), func() { s.storeSnapshot(n, meta, w, state[len(state)/2:]) })
}

func (s *sim) storeSnapshot(n *simNode, meta SnapshotMeta, w SnapshotWriter, rest []byte) {
	if n.core.role == Dead {
		return
	}
	k := &n.snaps
	k.tried[meta.ID] = meta
	err := s.snapshotIO(n, func() error {
		if _, err := w.Write(rest); err != nil {
			return err
		}
		return w.Commit()
	})
	if errors.Is(err, errSimPower) {
		s.crashAndRestart(n)
		return
	}
	k.capturing = false
	if err != nil {
		s.note(n.i, "does not store a snapshot up to %v: %v", meta.Last, err)
		s.snaps.Failed++
		w.Abort()
		return
	}
	s.snaps.Taken++
	k.incoming.abort(meta.Last.Index)
	k.stored(meta)
	if s.boundary(n) {
		return
	}
	upTo := meta.Last.Index
	if s.chance(0.5) {
		upTo -= Index(s.rng.Int64N(int64(upTo) + 1))
	}
	s.note(n.i, "has a snapshot up to %v, and may forget entries up to %d", meta.Last, upTo)
	s.begin(n).snapshotTaken(meta.Last, upTo)
	s.end(n)
}

// simTransfer is one snapshot on its way to a follower.
type simTransfer struct {
	s       *sim
	n       *simNode
	request snapshotRequest
	reader  SnapshotReader
	args    snapshotArgs
	call    *simCall // whose answer is waited for
	ended   bool

	offset   uint64 // the follower has, or had, this much
	progress time.Duration
}

// sendSnapshots begins the transfers that a transition asked for.
func (s *sim) sendSnapshots(n *simNode, qs []snapshotRequest) {
	for _, q := range qs {
		s.later(n, s.diskTime(n), func() { s.sendSnapshot(n, q) })
	}
}

func (s *sim) sendSnapshot(n *simNode, q snapshotRequest) {
	if n.core.role == Dead {
		return
	}
	t := &simTransfer{s: s, n: n, request: q}
	meta, r, err := n.storage().OpenSnapshot(n.core.newestSnapshot)
	if err != nil {
		if !s.mayFail(n, err) {
			s.fail("node %d can't open its newest snapshot: %v", n.i, err)
		}
		t.end(err)
		return
	}
	s.note(n.i, "sends member %d its snapshot up to %v", q.to, meta.Last)
	t.reader, t.progress = r, s.now
	t.args = snapshotArgs{Term: q.term, Leader: n.core.self, Meta: meta, Size: uint64(r.Size())}
	t.send()
}

// send sends one block. The transfer breaks off if nothing comes back.
func (t *simTransfer) send() {
	s, n := t.s, t.n
	o := s.peer(n.core, t.request.to)
	if o == nil || !s.acquainted(n, t.request.to, o) {
		t.end(errSnapshotPointless)
		return
	}
	args := t.args
	c := &simCall{kind: callSnapshot, from: n.i, to: o.i, toID: t.request.to, toDisk: o.disks, fromRun: n.run, snapshot: &args, transfer: t}
	t.call = c
	patience := s.swarm.timeout
	if s.faulty {
		patience = s.someTimeouts(0.3, 4)
	}
	s.later(n, patience, func() {
		if t.call == c {
			t.broke(errSimUnanswered)
		}
	})
	s.transmit(&simMsg{call: c})
}

var errSimUnanswered = errors.New("no answer")

// answered takes the answer to the newest block; others came too late.
func (t *simTransfer) answered(call *simCall, r *snapshotReply) {
	s, n := t.s, t.n
	if t.ended || t.call != call || n.core.role == Dead {
		return
	}
	if r == nil {
		t.broke(errors.New("the receiver failed"))
		return
	}
	run, on := n.run, false
	c := s.begin(n)
	if !c.stepDownFor(t.request.to, r.Term) {
		on = c.snapshotProgress(t.request, r.Offset, t.args.Size)
	}
	s.end(n)
	switch {
	case n.run != run || n.core == nil:
		return
	case r.Done:
		t.end(nil)
		return
	case !on:
		t.end(errSnapshotPointless)
		return
	}
	if r.Offset > t.offset {
		t.offset, t.progress = r.Offset, s.now
	}
	if t.args.Data == nil && r.Offset > 0 {
		s.snaps.Resumed++
	}
	t.args.Offset = r.Offset
	t.args.Data = make([]byte, min(uint64(s.swarm.blockBytes), t.args.Size-r.Offset))
	if k, err := t.reader.ReadAt(t.args.Data, int64(r.Offset)); k < len(t.args.Data) {
		if !s.mayFail(n, err) {
			s.fail("node %d can't read its snapshot up to %v: %v", n.i, t.args.Meta.Last, err)
		}
		t.end(err)
		return
	}
	t.send()
}

// broke goes on with the same snapshot on another connection, as long as it
// makes sense.
func (t *simTransfer) broke(err error) {
	s, n := t.s, t.n
	if n.core.role == Dead {
		return
	}
	s.snaps.Broken++
	run := n.run
	on := s.begin(n).snapshotProgress(t.request, t.offset, t.args.Size)
	s.end(n)
	switch {
	case n.run != run || n.core == nil:
	case !on || s.now-t.progress > snapshotPatience*s.swarm.timeout:
		t.end(err)
	default:
		t.args.Offset, t.args.Data = 0, nil
		t.send()
	}
}

// end tells the core how the transfer ended.
func (t *simTransfer) end(err error) {
	s, n := t.s, t.n
	t.ended, t.call = true, nil
	if t.reader != nil {
		t.reader.Close()
	}
	if n.core.role == Dead {
		return
	}
	if err == nil {
		s.snaps.Sent++
	} else {
		s.snaps.GivenUp++
	}
	s.note(n.i, "ends sending member %d its snapshot up to %v: %v", t.request.to, t.args.Meta.Last, err)
	s.begin(n).snapshotSent(t.request, t.args.Meta.Last, err)
	s.end(n)
}

// onBlock is a server's InstallSnapshot: what it does in one step, then what it
// does with the disk, then the other step. Time passes between them.
func (s *sim) onBlock(n *simNode, call *simCall) {
	run := n.run
	r := &snapshotReply{}
	wanted := s.begin(n).onInstallSnapshot(call.snapshot, r)
	s.end(n)
	switch {
	case n.run != run || n.core == nil:
	case wanted:
		s.later(n, s.diskTime(n), func() { s.takeBlock(n, call, r) })
	default:
		s.answerBlock(n, call, r)
	}
}

func (s *sim) takeBlock(n *simNode, call *simCall, r *snapshotReply) {
	if n.core.role == Dead {
		return
	}
	k, a := &n.snaps, call.snapshot
	if run := n.run; k.late != nil {
		if (*k.late)(); n.run != run || n.core == nil {
			return
		}
	}
	k.tried[a.Meta.ID] = a.Meta
	err := s.snapshotIO(n, func() (err error) {
		r.Offset, r.Done, err = k.incoming.take(n.storage(), a, func() {})
		return err
	})
	switch {
	case errors.Is(err, errSimPower):
		s.crashAndRestart(n)
		return
	case err != nil:
		s.note(n.i, "does not take a block of a snapshot: %v", err)
		s.transmit(&simMsg{call: call, isReply: true})
		return
	case !r.Done:
		s.answerBlock(n, call, r)
		return
	}
	s.note(n.i, "has received a snapshot up to %v", a.Meta.Last)
	s.snaps.Received++
	k.stored(a.Meta)
	if s.boundary(n) {
		return
	}
	if s.strikes(faultInstallLate, n.i, s.swarm.installLateP) {
		// Others may bring what it includes, but no snapshot is stored meanwhile.
		late := new(func())
		*late = func() {
			if k.late == late {
				k.late = nil
				s.install(n, call, r)
			}
		}
		k.late = late
		s.later(n, s.someTimeouts(0.1, 20), *late)
		return
	}
	s.install(n, call, r)
}

func (s *sim) install(n *simNode, call *simCall, r *snapshotReply) {
	if n.core.role == Dead {
		return
	}
	run, meta, start := n.run, call.snapshot.Meta, n.core.log.start.Index
	if meta.Last.Index <= n.core.commitIndex {
		s.snaps.Stale++
	}
	s.begin(n).installSnapshot(&meta)
	s.end(n)
	if n.run != run || n.core == nil {
		return
	}
	if n.core.log.start.Index > start {
		s.snaps.Replaced++
	}
	s.answerBlock(n, call, r)
}

// answerBlock answers when everything that is staged is durable.
func (s *sim) answerBlock(n *simNode, call *simCall, r *snapshotReply) {
	n.snaps.replies = append(n.snaps.replies, simBlockReply{n.core.lsn, call, r})
	s.releaseBlocks(n)
}

// releaseBlocks sends the answers to blocks that wait for nothing any more.
func (s *sim) releaseBlocks(n *simNode) {
	k := &n.snaps
	for len(k.replies) > 0 && k.replies[0].needs <= n.core.durableLSN {
		r := k.replies[0]
		k.replies = k.replies[1:]
		if n.disk.hard.Term < r.reply.Term {
			s.fail("9 node %d speaks of term %d, its disk of term %d", n.i, r.reply.Term, n.disk.hard.Term)
		}
		n.maxTermSent = max(n.maxTermSent, r.reply.Term)
		s.transmit(&simMsg{call: r.call, isReply: true, snapshotReply: r.reply})
	}
}

// restoreReplaced restores the state from the snapshot that has replaced the
// log. It reads it now and has it later, as a state machine takes its time.
func (s *sim) restoreReplaced(n *simNode) {
	last := n.core.newestSnapshot
	meta, state, err := n.readSnapshot(last)
	if err != nil {
		if !s.mayFail(n, err) {
			s.fail("node %d can't read the snapshot up to %v, which has replaced its log: %v", n.i, last, err)
		}
		s.diskFails(n, err)
		return
	}
	n.applying = true
	s.later(n, s.diskTime(n), func() {
		n.applying = false
		if n.core.role == Dead {
			return
		}
		s.loadState(n, &meta, state)
		s.snaps.Restored++
		s.load.settle(s, firstOf(n.wait.jump(last)))
		s.scheduleApply(n)
	})
}

func (n *simNode) readSnapshot(last EntryID) (SnapshotMeta, []byte, error) {
	meta, r, err := n.storage().OpenSnapshot(last)
	if err != nil {
		return meta, nil, err
	}
	defer r.Close()
	state, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	return meta, state, err
}

// bootSnapshots restores the state of a node that starts. It returns false if
// the node refuses to start.
func (s *sim) bootSnapshots(n *simNode, rec *Recovered) (*SnapshotMeta, bool) {
	k := &n.snaps
	k.begin()
	n.machine, n.applied, n.sessions = simMachine{}, 0, newSessionTable()
	s.checkRecovered(n, rec)
	meta, err := rec.restoreNewest("node", func(meta *SnapshotMeta) (begun bool, err error) {
		_, state, err := n.readSnapshot(meta.Last)
		if err != nil {
			return true, err
		}
		s.loadState(n, meta, state)
		return true, nil
	})
	if err != nil {
		if n.wal == nil {
			s.fail("node %d does not start: %v", n.i, err)
		}
		n.wal.storage.Close()
		s.doesNotStart(n, err, 0)
		return nil, false
	}
	k.newest = SnapshotMeta{}
	if meta != nil {
		k.newest = *meta
		s.snaps.Restarts++
		if meta.Last != rec.Snapshots[0].Last {
			s.snaps.Fallbacks++
		}
	}
	return meta, true
}

// checkRecovered compares the snapshots that a disk holds with those that it
// should: the newest durable one, and nothing that was not completed.
func (s *sim) checkRecovered(n *simNode, rec *Recovered) {
	k := &n.snaps
	found := k.newest.Last.Index == 0 || n.suspect
	for i, meta := range rec.Snapshots {
		want, ok := k.tried[meta.ID]
		if !ok || !sameMeta(meta, want) {
			s.fail("node %d finds a snapshot up to %v that nobody has stored", n.i, meta.Last)
		}
		if i > 0 && rec.Snapshots[i-1].Last.Index < meta.Last.Index {
			s.fail("node %d finds a snapshot up to %v behind one up to %v", n.i, meta.Last, rec.Snapshots[i-1].Last)
		}
		found = found || meta.Last.Index >= k.newest.Last.Index
	}
	if !found {
		s.fail("14 node %d has lost its snapshot up to %v; its log starts after %v", n.i, k.newest.Last, rec.Start)
	}
	if n.wal == nil {
		return
	}
	names, err := n.wal.mem.List("node/snap")
	for _, name := range names {
		if err == nil && len(name) > 4 && name[len(name)-4:] == ".tmp" {
			s.fail("node %d leaves %s behind when it starts", n.i, name)
		}
	}
}

// load1 puts a state into a node's machine, and compares it with what all nodes
// agree that it was (15, 18).
func (s *sim) loadState(n *simNode, meta *SnapshotMeta, state []byte) {
	sessions, err := readSessions(meta, memoryReader{bytes.NewReader(state)})
	if err != nil {
		s.fail("node %d: %v", n.i, err)
	}
	at, m, err := decodeSimMachine(state[meta.Sessions:])
	if err != nil {
		s.fail("node %d restores a snapshot up to %v: %v", n.i, meta.Last, err)
	}
	if t, ok := s.book.commitTerm(meta.Last.Index); at != meta.Last.Index || !ok || t != meta.Last.Term {
		s.fail("15 node %d restores the state after entry %d from a snapshot up to %v, committed is term %d (%v)", n.i, at, meta.Last, t, ok)
	}
	if want := s.book.machineAt(at); m.hash != want.hash || m.keys != want.keys {
		s.fail("18 node %d restores another state than others had after entry %d", n.i, at)
	}
	if sessionDigest(sessions) != s.book.digestAt(at) {
		s.fail("18 node %d restores other sessions than others had after entry %d", n.i, at)
	}
	if meta.Last.Index <= n.applied {
		s.fail("13 node %d restores a snapshot up to %v after it has applied entry %d", n.i, meta.Last, n.applied)
	}
	if !s.book.configured(meta.ConfigIndex, meta.Config) {
		s.fail("16 node %d restores a snapshot up to %v with a configuration that is not entry %d's", n.i, meta.Last, meta.ConfigIndex)
	}
	n.machine, n.applied, n.sessions = m, at, sessions
	n.snaps.lastTime, n.snaps.config = meta.Time, configAt{meta.ConfigIndex, meta.Config}
}

// configured tells whether the committed entry i holds this configuration.
func (b *ledger) configured(i Index, data []byte) bool {
	term, ok := b.commitTerm(i)
	if !ok || i == 0 {
		return false
	}
	k := slices.IndexFunc(b.entries[i], func(l ledgerEntry) bool { return l.term == term })
	e, err := ParseEntries(i, b.entries[i][k].raw)
	return err == nil && e.kind(0) == entryConfiguration && string(e.data(0)) == string(data)
}

// snapshotsHold checks what must be true of a node's snapshots and its log
// after each transition (13, 14).
func (b *ledger) snapshotsHold(s *sim, n *simNode) {
	c, k := n.core, &n.snaps
	switch {
	case n.applied != n.wait.applied:
		s.fail("13 node %d has applied entry %d, and tells those who wait of entry %d", n.i, n.applied, n.wait.applied)
	case n.applied > c.commitIndex || c.newestSnapshot.Index > c.commitIndex:
		s.fail("14 node %d has applied entry %d and a snapshot up to %v, commit is %d", n.i, n.applied, c.newestSnapshot, c.commitIndex)
	case c.log.start.Index > c.newestSnapshot.Index:
		s.fail("14 node %d: its log starts after %v, its newest snapshot ends with %v", n.i, c.log.start, c.newestSnapshot)
	case !k.covers(c.newestSnapshot.Index):
		s.fail("14 node %d relies on a snapshot up to %v, durable is one up to %v", n.i, c.newestSnapshot, k.newest.Last)
	case !k.covers(n.disk.start.Index):
		s.fail("14 node %d: its log on disk starts after %v, its durable snapshot ends with %v", n.i, n.disk.start, k.newest.Last)
	}
}

// noted remembers of what was applied what a snapshot says of it.
func (k *nodeSnapshots) noted(e Entries) {
	k.lastTime = lastTimeOf(e)
	for i := range e.Len() {
		if e.kind(i) == entryConfiguration {
			k.config = configAt{e.First() + Index(i), e.data(i)}
		}
	}
}

// encode returns the state after entry i, with padding behind it.
func (m *simMachine) encode(i Index, padding int) []byte {
	b := appendUint64s(nil, uint64(i), m.hash)
	b = appendUint64s(b, m.keys[:]...)
	return append(b, make([]byte, padding)...)
}

func decodeSimMachine(b []byte) (Index, simMachine, error) {
	var m simMachine
	r := reader{b: b}
	i := Index(r.uint64())
	m.hash = r.uint64()
	for k := range m.keys {
		m.keys[k] = r.uint64()
	}
	if r.err == nil && slices.ContainsFunc(r.b, func(c byte) bool { return c != 0 }) {
		r.err = fmt.Errorf("its padding is not zero")
	}
	return i, m, r.err
}

// TestSimSnapshots: snapshots at every turn, small blocks, a bad network and
// many crashes.
func TestSimSnapshots(t *testing.T) {
	var got simSnapshots
	missing := func() bool {
		return got.Taken == 0 || got.Failed == 0 || got.Sent == 0 || got.Broken == 0 || got.Resumed == 0 || got.GivenUp == 0 || got.Replaced == 0 || got.Restored == 0 || got.Restarts == 0
	}
	for _, disk := range []string{"model", "wal"} {
		t.Run(disk, func(t *testing.T) {
			plan := simPlan{test: "TestSimSnapshots", disk: disk, tune: func(w *simSwarm) {
				w.snapshotP, w.stateMax, w.snapshotFailP, w.snapshotSlowP, w.installLateP = 0.2, 200, 0.01, 0.3, 0.4
				w.dropP, w.dupP, w.oldP, w.tailP = 0.02, 0.2, 0.2, 0.2
				w.rounds, w.boundaryP = 2, 0.3
				if w.nodes < 3 {
					w.nodes, w.voters = 3, 3
				}
			}}
			if *simSeed != 0 {
				replaySim(t, plan)
				return
			}
			runSeeds(t, seedsFrom(1, plan, untilSeen(20, missing)), func(_ uint64, res simResult) { got.add(res.snaps) })
		})
	}
	t.Logf("%+v", got)
	if *simSeed == 0 && missing() {
		t.Errorf("something did not happen: %+v", got)
	}
}
