package raft

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"example.com/raft/internal/vfs"
)

// simLosses counts what disks lost or refused.
type simLosses struct {
	Rotted       int // disks in which bits turned over
	RefusedStart int // starts refused because of that
	RefusedRead  int // reads refused because of that
	Wiped        int // directories emptied
	Filled       int // disks that became full
	FullWrites   int // writes that waited for space
	FullStarts   int // starts that failed for lack of space
	Noticed      int // times that a running node took note of a full disk
	Rejected     int // proposals refused because of full disks
	Hung         int // disks that hung
	Yielded      int // leaders that gave leadership up because their disk hung
	ReadErrors   int // reads that failed and may succeed later

	ApplyFailures int // state machines that failed
	StayedFailed  int // of those in a healed majority
	Needed        int // leaders that should not lead, elected because others need them
}

func (l *simLosses) add(o simLosses) {
	l.Rotted += o.Rotted
	l.RefusedStart += o.RefusedStart
	l.RefusedRead += o.RefusedRead
	l.Wiped += o.Wiped
	l.Filled += o.Filled
	l.FullWrites += o.FullWrites
	l.FullStarts += o.FullStarts
	l.Noticed += o.Noticed
	l.Rejected += o.Rejected
	l.Hung += o.Hung
	l.Yielded += o.Yielded
	l.ReadErrors += o.ReadErrors
	l.ApplyFailures += o.ApplyFailures
	l.StayedFailed += o.StayedFailed
	l.Needed += o.Needed
}

// sound tells whether the node has never lost any of what its disk was told to keep.
func (n *simNode) sound() bool { return n.lost == "" && !n.suspect }

// mayLose tells whether the node's disk may be lost: what a Raft cluster
// survives is the loss of a minority of its voters. A seed draws how many of
// those it makes use of. Where members change none is lost: which voters a
// configuration to come can do without is not known yet.
func (s *sim) mayLose(n *simNode) bool {
	if !n.sound() || s.swarm.losses == 0 || s.swarm.spares > 0 {
		return false
	}
	gone := 0
	for _, o := range s.nodes[:s.swarm.voters] {
		if !o.sound() {
			gone++
		}
	}
	return n.i >= s.swarm.voters || gone < min(s.swarm.losses, (s.swarm.voters-1)/2)
}

// feasible replaces a fault of the disk that can't strike the node, or that the
// cluster would not survive, by a crash.
func (s *sim) feasible(f int, n *simNode) int {
	switch {
	case f == nemRot && (!s.mayLose(n) || n.core == nil || n.core.role == Dead),
		f == nemWipe && !s.mayLose(n),
		f == nemFull && (n.wal == nil || n.lost != ""):
		return nemCrash
	}
	return f
}

// loses takes a node out of this run for good. Its model keeps what its disk
// held, because what was committed with its help stays committed.
func (s *sim) loses(n *simNode, why string) {
	s.note(n.i, "is lost: %s", why)
	n.lost = why
	n.restarting = false
	n.restartSeq++
}

// rot turns over one bit of what is durable on a node's disk. The node runs on;
// its next start or a read must refuse what it finds, or find all that it
// wrote. The log is sealed first, as it is when it has been idle for a moment:
// damage to a batch that is not sealed can't be told from a torn write, which
// the tests of internal/wal count apart.
func (s *sim) rot(n *simNode) {
	n.suspect = true
	s.losses.Rotted++
	if n.wal == nil {
		n.disk.rotten = n.disk.start.Index + 1 + Index(s.rng.Int64N(int64(n.disk.last()-n.disk.start.Index)+1))
		s.note(n.i, "entry %d rots", n.disk.rotten)
		return
	}
	w := n.wal
	s.makeSpace(n)
	if err := w.storage.Seal(); err != nil {
		s.fail("node %d can't seal: %v", n.i, err)
	}
	name, off := w.somewhere(s)
	bit := uint(s.rng.IntN(8))
	if err := w.mem.FlipBit(name, off, bit); err != nil {
		s.fail("node %d: %v", n.i, err)
	}
	s.note(n.i, "bit %d of byte %d of %s rots", bit, off, name)
}

// somewhere draws a byte of the disk that is not zero: half of the time one of
// the newest 4096, because those are read again.
func (w *simWAL) somewhere(s *sim) (name string, off int64) {
	files := []string{"node/identity"}
	names, err := w.mem.List("node/wal")
	if err != nil {
		s.fail("list a log: %v", err)
	}
	for _, f := range names {
		files = append(files, filepath.Join("node/wal", f))
	}
	newest := s.chance(0.5)
	for k := len(files) - 1; ; k-- {
		if name = files[max(k, 0)]; !newest {
			name = files[s.rng.IntN(len(files))]
		}
		var used []int64
		for i, c := range w.contents(s, name) {
			if c != 0 {
				used = append(used, int64(i))
			}
		}
		if newest {
			used = used[max(0, len(used)-4096):]
		}
		if len(used) > 0 { // not a lock
			return name, used[s.rng.IntN(len(used))]
		}
	}
}

func (w *simWAL) contents(s *sim, name string) []byte {
	f, err := w.mem.Open(name)
	if err != nil {
		s.fail("open %s: %v", name, err)
	}
	defer f.Close()
	size, err := f.Size()
	b := make([]byte, size)
	if err == nil && size > 0 {
		_, err = f.ReadAt(b, 0)
	}
	if err != nil {
		s.fail("read %s: %v", name, err)
	}
	return b
}

// wipe empties a node's directory. What starts there next is not the node that
// was there: it finds no term, no vote, no entry and no configuration, and so
// it asks to join, under a new directory ID, and its peers refuse it until
// somebody replaces the old member (identity_test.go). The simulator has no
// such layer: it checks that nothing of the old node is found, and the node is
// gone for the rest of the run.
func (s *sim) wipe(n *simNode) {
	s.losses.Wiped++
	s.crash(n)
	s.loses(n, "its directory was wiped")
	if n.wal == nil {
		return
	}
	w := n.wal
	w.mem = vfs.NewMem(rand.New(rand.NewPCG(s.seed, uint64(n.i)+777)))
	rec, err := w.open(1 << 20)
	if err != nil {
		s.fail("node %d does not start in an empty directory: %v", n.i, err)
	}
	if rec.HardState != (HardState{}) || rec.Start != (EntryID{}) || rec.Last != 0 || rec.Config != nil || rec.Boot != 1 {
		s.fail("node %d finds %+v in an empty directory", n.i, rec)
	}
	if err := w.storage.Close(); err != nil {
		s.fail("node %d: close: %v", n.i, err)
	}
}

// fill leaves a node's disk without space for another segment, for a while.
func (s *sim) fill(n *simNode) {
	w := n.wal
	s.losses.Filled++
	w.full, w.fullUntil = true, s.now+s.someTimeouts(0.2, 20)
	w.mem.SetCapacity(w.mem.Used() + s.rng.Int64N(8192) + 1)
	s.note(n.i, "its disk is full until %v", w.fullUntil)
	s.push(simEvent{at: w.fullUntil, kind: evThen, node: n.i, run: n.run, then: func() { s.makeSpace(n); s.noteSpace(n) }})
}

// makeSpace frees a full disk when its time has come, and lets the log find out.
func (s *sim) makeSpace(n *simNode) {
	if w := n.wal; w != nil && w.full && (s.now >= w.fullUntil || !s.faulty) {
		w.full = false
		w.mem.SetCapacity(0)
		if w.storage != nil && w.storage.log != nil && w.storage.log.Err() == nil {
			if err := w.storage.log.Prepare(); err != nil {
				s.fail("node %d prepares a segment with space again: %v", n.i, err)
			}
		}
	}
}

// noteSpace tells the core whether its disk is full.
func (s *sim) noteSpace(n *simNode) {
	if n.wal == nil || n.core.role == Dead {
		return
	}
	_, full := n.wal.storage.Room()
	if full != nil && !n.wal.full {
		s.fail("node %d takes its disk for full: %v", n.i, full)
	}
	if (full == nil) != (n.core.full == nil) {
		if full != nil {
			s.losses.Noticed++
		}
		s.begin(n).diskSpace(full)
		s.end(n)
	}
}

// claim does what the log's own goroutine does elsewhere while entries that have
// come wait for space.
func (n *simNode) claim(a *appendArgs) {
	if n.wal == nil || n.core.role == Dead {
		return
	}
	size := int64(0)
	for _, e := range a.Entries {
		size += saveBytes(e)
	}
	n.wal.storage.Claim(size)
}

// hang lets a node's disk hang for a while, often for longer than a leader with
// such a disk should lead.
func (s *sim) hang(n *simNode) {
	if l := s.highestLeader(); l != nil && s.chance(0.5) {
		n = l
	}
	s.losses.Hung++
	n.hungUntil = s.now + s.someTimeouts(0.5, 40)
	s.note(n.i, "its disk hangs until %v", n.hungUntil)
}

// refusesDamage tells whether an error says that what is on disk is damaged.
func refusesDamage(err error) bool {
	var corrupt *CorruptError
	var identity *IdentityError
	return errors.As(err, &corrupt) && corrupt.Do != "" || errors.As(err, &identity) && identity.Do != ""
}

// mayFail tells whether the faults that struck the node's disk account for an
// error, and counts it.
func (s *sim) mayFail(n *simNode, err error) bool {
	switch {
	case errors.Is(err, errSimDisk):
		return true
	case n.suspect && refusesDamage(err):
		s.losses.RefusedRead++
		return true
	}
	return false
}

// doesNotStart judges a start that failed, after some changes to the disk.
func (s *sim) doesNotStart(n *simNode, err error, changes int) {
	s.note(n.i, "does not start: %v", err)
	if k := n.wal.mem.OpenFiles(); k != 0 {
		s.fail("node %d leaves %d files open after it did not start: %v", n.i, k, err)
	}
	n.wal.stop(true)
	switch {
	case n.suspect && refusesDamage(err):
		if changes != 0 {
			s.fail("node %d refuses what has rotted, after it changed the disk %d times: %v", n.i, changes, err)
		}
		s.losses.RefusedStart++
		s.loses(n, "its disk has rotted: it refuses to start")
	case n.wal.full && vfs.IsNoSpace(err):
		s.losses.FullStarts++
		s.restartAfter(n, s.someTimeouts(0.5, 4))
	default:
		s.fail("node %d does not start: %v", n.i, err)
	}
}

// TestSimDiskFaults: disks that rot, are wiped or become full, often. Nodes
// refuse damage and say so, nodes without space end and come back, and the
// cluster goes on.
func TestSimDiskFaults(t *testing.T) {
	plan := simPlan{test: "TestSimDiskFaults", disk: "wal", tune: func(w *simSwarm) {
		w.nodes, w.voters, w.spares, w.losses, w.rounds = 5, 5, 0, 2, 2
		w.nemeses = []int{nemRot, nemWipe, nemFull, nemCrashAll, nemPause, nemClog, nemSplit, nemHealNet}
		w.nemesisEvery = w.timeout
		w.clientEvery = w.timeout / 20
		w.tailBytes, w.flushFailP, w.boundaryP = 100, 0.002, 0
	}}
	var got simLosses
	if *simSeed != 0 {
		replaySim(t, plan)
		return
	}
	missing := func() bool {
		return got.RefusedStart == 0 || got.RefusedRead == 0 || got.Wiped == 0 || got.FullWrites == 0 || got.FullStarts == 0 || got.Noticed == 0 || got.Rejected == 0 || got.ReadErrors == 0
	}
	more := func(n int) bool { return n < seedCount(40) || missing() && n < 100 }
	runSeeds(t, seedsFrom(37, plan, more), func(_ uint64, res simResult) { got.add(res.losses) }) // the first in which rot is read: few do
	t.Logf("%+v", got)
	if missing() {
		t.Errorf("some fault did not happen, or had no effect: %+v", got)
	}
}

// runLosses runs up to 20 seeds of a plan, in which enough must have happened.
func runLosses(t *testing.T, plan simPlan, enough func(simLosses) bool) {
	t.Helper()
	if *simSeed != 0 {
		replaySim(t, plan)
		return
	}
	var got simLosses
	runSeeds(t, seedsFrom(1, plan, untilSeen(20, func() bool { return !enough(got) })), func(_ uint64, res simResult) { got.add(res.losses) })
	t.Logf("%+v", got)
	if !enough(got) {
		t.Errorf("some fault did not happen, or had no effect: %+v", got)
	}
}

// TestSimHungDisks: disks that hang, often for longer than a leader's may. Leaders
// then give leadership up, and the cluster goes on.
func TestSimHungDisks(t *testing.T) {
	plan := simPlan{test: "TestSimHungDisks", tune: func(w *simSwarm) {
		w.nodes, w.voters, w.spares, w.losses, w.rounds, w.roundTimeouts = 3, 3, 0, 0, 2, 60
		w.nemeses = []int{nemHang, nemHang, nemHang, nemCrash, nemHealNet, nemClog}
		w.nemesisEvery = 4 * w.timeout
		w.clientEvery = w.timeout / 5
		w.boundaryP, w.flushFailP = 0, 0
	}}
	runLosses(t, plan, func(got simLosses) bool { return got.Hung >= 20 && got.Yielded >= 5 })
}

// TestSimApplyFails: state machines that fail, and stay so on one node of the
// majority that must go on in the end: it may have what the others lack.
func TestSimApplyFails(t *testing.T) {
	plan := simPlan{test: "TestSimApplyFails", tune: func(w *simSwarm) {
		w.nodes, w.voters, w.spares, w.losses, w.rounds, w.roundTimeouts = 3, 3, 0, 0, 4, 30
		w.nemeses = []int{nemApplyFails, nemApplyFails, nemCrash, nemCrashLeader, nemIsolateLeader, nemHealNet}
		w.nemesisEvery = 2 * w.timeout
		w.clientEvery = w.timeout / 5
		w.boundaryP, w.flushFailP = 0, 0
	}}
	runLosses(t, plan, func(got simLosses) bool { return got.ApplyFailures >= 100 && got.StayedFailed >= 20 && got.Needed >= 5 })
}
