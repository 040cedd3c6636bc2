package raft

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"example.com/raft/internal/vfs"
	"example.com/raft/internal/wal"
)

// simWAL is the real disk storage of a node, on a file system in memory that
// loses power. The node's simDisk runs beside it as the model: what the log
// recovers must be what the model has durable, and perhaps a part of what was
// under way.
type simWAL struct {
	mem     *vfs.Mem
	rng     *rand.Rand
	options wal.Options
	id      Identity
	storage *diskStorage
	ops     int   // operations left until the next one fails with err, 0 if none will
	err     error // with which it fails
	fired   bool
	changes int // operations so far that changed what is on the disk

	full      bool // until fullUntil; it then has space again
	fullUntil time.Duration
}

var errSimPower = errors.New("power failure")

func newSimWAL(s *sim, n *simNode) *simWAL {
	rng := rand.New(rand.NewPCG(s.seed, uint64(n.i+1000*n.disks)+77))
	w := &simWAL{mem: vfs.NewMem(rng), rng: rng, id: Identity{ClusterID: "sim", NodeID: n.name}}
	w.options = wal.Options{
		MinSegmentBytes: 16384, MaxSegmentBytes: 16384 << s.rng.IntN(3), MaxSpares: s.between(-1, 2),
		Rand: rng.Uint64, PrepareInline: true,
	}
	w.mem.SetHook(w.hook)
	return w
}

func (w *simWAL) hook(op vfs.Op) error {
	if !op.Kind.Changes() {
		return nil
	}
	if op.Kind != vfs.OpSync && op.Kind != vfs.OpSyncDir {
		w.changes++
	}
	if w.ops == 0 {
		return nil
	}
	if w.ops--; w.ops > 0 {
		return nil
	}
	w.fired = true
	return w.err
}

// failSoon makes one of the next operations that change the disk fail.
func (w *simWAL) failSoon(err error, within int) {
	w.ops, w.err, w.fired = 1+w.rng.IntN(within), err, false
}

func (w *simWAL) open(tailBytes int) (Recovered, error) {
	w.storage = &diskStorage{fs: w.mem, dir: "node", tailBytes: tailBytes, options: w.options, random: func(b []byte) {
		for i := range b {
			b[i] = byte(w.rng.Uint32())
		}
	}}
	return w.storage.Open(context.Background(), w.id)
}

// begin puts the first entry into the empty directory.
func (w *simWAL) begin(s *sim, first Entries) {
	if _, err := w.open(1 << 20); err != nil {
		s.fail("an empty directory does not open: %v", err)
	}
	if first.Len() > 0 {
		w.storage.Append(Save{LSN: 1, Entries: []Entries{first}})
	}
	if _, err := w.storage.Flush(); err != nil {
		s.fail("the first flush: %v", err)
	}
	if err := w.storage.Close(); err != nil {
		s.fail("the first close: %v", err)
	}
}

// stop ends the process. Without power the machine loses what was not synced;
// with it the page cache stays.
func (w *simWAL) stop(power bool) {
	w.ops = 0
	if power {
		w.mem.Kill()
	} else {
		w.mem.Crash(w.rng.IntN)
	}
	w.storage = nil
}

// recover opens the real log and lets the model follow it. It returns false if
// the node did not start; unless it is lost, it will try again.
func (s *sim) recover(n *simNode) (Recovered, bool) {
	w, d := n.wal, n.disk
	s.makeSpace(n)
	changes := w.changes
	if s.strikes(faultPowerRecovery, n.i, 0.1) {
		w.failSoon(errSimPower, 12)
	}
	rec, err := w.open(s.rng.IntN(4096))
	if w.fired && errors.Is(err, errSimPower) {
		w.fired = false
		w.stop(false)
		s.note(n.i, "the power fails during recovery")
		s.restartAfter(n, s.someTimeouts(0.001, 1))
		return rec, false
	}
	w.ops, w.fired = 0, false
	if err != nil {
		s.doesNotStart(n, err, w.changes-changes)
		return rec, false
	}
	var parts []Save
	for i := range d.staged {
		parts = append(parts, d.staged[i].parts()...)
	}
	for k := 0; ; k++ {
		if s.recovered(n, &rec) {
			break
		}
		if k == len(parts) {
			s.fail("12 node %d recovers %+v %v..%d %v, which is not what was durable with a part of what was under way; durable at last: %+v %v..%d",
				n.i, rec.HardState, rec.Start, rec.Last, rec.Runs, d.hard, d.start, d.last())
		}
		d.apply(&parts[k])
	}
	s.book.diskChanged(s, n)
	d.staged, d.lsn = nil, 0
	return rec, true
}

// recovered tells whether the real log recovered exactly what the model has.
func (s *sim) recovered(n *simNode, rec *Recovered) bool {
	d := n.disk
	if rec.HardState != d.hard || rec.Start != d.start || rec.Last != d.last() || !sameConfigs(rec, d.configs()) {
		return false
	}
	for lo := rec.Start.Index + 1; lo <= rec.Last; {
		runs, err := n.wal.storage.Read(lo, rec.Last, 1<<16)
		if err != nil {
			s.fail("node %d recovers entry %d and can't read it: %v", n.i, lo, err)
		}
		for _, e := range runs {
			if !d.same(e) {
				return false
			}
			lo = e.Last() + 1
		}
	}
	last := rec.Last + 1
	for i := len(rec.Tail) - 1; i >= 0; i-- {
		e := rec.Tail[i]
		if e.First() <= rec.Start.Index { // a run that was partly compacted
			e = e.slice(int(rec.Start.Index-e.First())+1, e.Len())
		}
		if e.Last()+1 != last || !d.same(e) {
			s.fail("node %d recovers a tail whose run %d to %d comes before %d (as stored: %v)", n.i, e.First(), e.Last(), last, d.same(e))
		}
		last = e.First()
	}
	if rec.Last > rec.Start.Index && len(rec.Tail) == 0 {
		s.fail("node %d recovers a log without its newest entry in memory", n.i)
	}
	l := newRaftLog(rec.Start, rec.Last, rec.Runs, rec.Tail)
	for i := rec.Start.Index + 1; i <= rec.Last; i++ {
		if want, _ := d.term(i); !l.matches(EntryID{i, want}) {
			s.fail("node %d recovers runs of terms %v, entry %d is of term %d", n.i, rec.Runs, i, want)
		}
	}
	return true
}

// sameConfigs tells whether a log recovered exactly the configurations of the model.
func sameConfigs(rec *Recovered, want []configAt) bool {
	var got []configAt
	if rec.Config != nil {
		got = append(slices.Clone(rec.older), configAt{rec.ConfigIndex, rec.Config})
	}
	return slices.EqualFunc(got, want, func(a, b configAt) bool { return a.index == b.index && bytes.Equal(a.data, b.data) })
}

// same tells whether the model has exactly these entries.
func (d *simDisk) same(e Entries) bool {
	for i := range e.Len() {
		at := e.First() + Index(i)
		if at <= d.start.Index || at > d.last() || !bytes.Equal(d.entries[at-d.start.Index-1].raw, e.raw(i)) {
			return false
		}
	}
	return true
}

// append and the following are how a node uses its disk: the model, and the
// real log if the seed has one.
func (n *simNode) appendDisk(save Save) {
	n.disk.Append(save)
	if n.wal != nil {
		n.wal.storage.Append(save)
	}
}

func (n *simNode) readDisk(lo, hi Index, maxBytes int) ([]Entries, error) {
	if n.s.strikes(faultReadFail, n.i, n.s.swarm.flushFailP) {
		n.s.losses.ReadErrors++
		return nil, errSimDisk
	}
	if n.wal == nil {
		return n.disk.Read(lo, hi, maxBytes)
	}
	runs, err := n.wal.storage.Read(lo, hi, maxBytes)
	for _, e := range runs {
		if e.Len() == 0 || e.First() != lo || !n.disk.same(e) {
			n.s.fail("node %d reads entries %d to %d, which are not those it wrote", n.i, e.First(), e.Last())
		}
		lo = e.Last() + 1
	}
	return runs, err
}

// flushDisk makes saves up to lsn durable. It returns errSimPower if the power
// failed during it and errSimDisk if the disk did.
func (n *simNode) flushDisk(lsn LSN) (LSN, error) {
	s, w := n.s, n.wal
	s.makeSpace(n)
	fails := s.strikes(faultFlushFail, n.i, s.swarm.flushFailP)
	if w == nil {
		if fails {
			return 0, errSimDisk
		}
		n.disk.flushTo(lsn)
		return lsn, nil
	}
	switch {
	case fails:
		w.failSoon(errSimDisk, 3)
	case s.strikes(faultPower, n.i, s.swarm.boundaryP*0.01):
		w.failSoon(errSimPower, 4)
	}
	released := slices.ContainsFunc(n.disk.staged, func(save Save) bool { return save.Start != nil })
	lsn, err := w.storage.Flush()
	if errors.Is(err, ErrDiskFull) && w.full && !w.fired {
		w.ops = 0
		return 0, err
	}
	if err != nil && !w.fired && !s.mayFail(n, err) {
		s.fail("node %d can't flush a sound disk: %v", n.i, err)
	}
	if err == nil {
		n.disk.flushTo(lsn)
		if s.chance(s.swarm.prepareP) || released && s.chance(0.5) {
			err = s.prepareDisk(n)
		}
	}
	if err == nil && s.chance(0.05) && w.ops == 0 {
		if err := w.storage.Seal(); err != nil {
			s.fail("node %d can't seal: %v", n.i, err)
		}
	}
	w.ops, w.fired = 0, false
	if err != nil {
		return 0, err
	}
	return lsn, nil
}

// prepareDisk does what the log's own goroutine does elsewhere: it prepares the
// next segment and reclaims those that have been released. The power may fail
// meanwhile; any other error comes back when the log needs a segment.
func (s *sim) prepareDisk(n *simNode) error {
	err := n.wal.storage.log.Prepare()
	if errors.Is(err, errSimPower) {
		return errSimPower
	}
	if err != nil && !s.mayFail(n, err) && !(n.wal.full && errors.Is(err, wal.ErrDiskFull)) {
		s.fail("node %d prepares a segment: %v", n.i, err)
	}
	return nil
}

// crashDisk loses what is lost when the node stops.
func (n *simNode) crashDisk() {
	if n.wal == nil {
		n.disk.crash(n.s.rng)
		return
	}
	n.wal.stop(n.s.chance(0.3))
}
