package raft

import (
	"context"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
)

// simDisk is a Storage that keeps what was flushed and loses the rest in a
// crash. It keeps entries one by one, so that the checks can look at what is
// durable without asking the code under test.
type simDisk struct {
	hard    HardState
	start   EntryID
	entries []simDiskEntry // from start.Index+1 on
	config  configAt       // the newest one up to start
	staged  []Save
	lsn     LSN           // durable position of this run
	snaps   MemoryStorage // its snapshots, nothing else
	rotten  Index         // an entry that can't be read, 0 if there is none
	lowest  Index         // the lowest index that changed since the checks looked, 0 if none did
}

type simDiskEntry struct {
	term Term
	raw  []byte
	conf []byte // of a configuration
}

var _ Storage = (*simDisk)(nil)

func (d *simDisk) CreateSnapshot(meta SnapshotMeta) (SnapshotWriter, error) {
	return d.snaps.CreateSnapshot(meta)
}

func (d *simDisk) OpenSnapshot(last EntryID) (SnapshotMeta, SnapshotReader, error) {
	return d.snaps.OpenSnapshot(last)
}

func newSimDisk(first Entries) *simDisk {
	d := &simDisk{}
	if first.Len() > 0 {
		d.put(first)
	}
	return d
}

func (d *simDisk) last() Index { return d.start.Index + Index(len(d.entries)) }

// term returns the term of a durable entry, like raftLog's.
func (d *simDisk) term(i Index) (Term, bool) {
	if i == d.start.Index {
		return d.start.Term, true
	}
	if i < d.start.Index || i > d.last() {
		return 0, false
	}
	return d.entries[i-d.start.Index-1].term, true
}

func (d *simDisk) put(e Entries) {
	if e.First() <= d.start.Index || e.First() > d.last()+1 {
		panic(fmt.Sprintf("simDisk: entries from %d on do not continue a log of %d to %d", e.First(), d.start.Index+1, d.last()))
	}
	if e.First() <= d.last() && (d.lowest == 0 || e.First() < d.lowest) {
		d.lowest = e.First()
	}
	d.entries = d.entries[:e.First()-d.start.Index-1]
	for i := range e.Len() {
		one := simDiskEntry{term: e.term(i), raw: e.raw(i)}
		if e.kind(i) == entryConfiguration {
			one.conf = e.data(i)
		}
		d.entries = append(d.entries, one)
	}
}

func (d *simDisk) apply(s *Save) {
	if s.HardState != nil {
		d.hard = *s.HardState
	}
	for _, e := range s.Entries {
		d.put(e)
	}
	if s.Snapshot != nil {
		if i := s.Start.Index + 1; i <= d.last() && (d.lowest == 0 || i < d.lowest) {
			d.lowest = i
		}
		d.start, d.entries, d.config = *s.Start, nil, configAt{s.Snapshot.ConfigIndex, s.Snapshot.Config}
	} else if s.Start != nil {
		for _, conf := range d.configs() {
			if conf.index <= s.Start.Index {
				d.config = conf
			}
		}
		d.entries = append([]simDiskEntry(nil), d.entries[s.Start.Index-d.start.Index:]...)
		d.start = *s.Start
	}
}

// configs returns the configurations that are durable, oldest first.
func (d *simDisk) configs() (out []configAt) {
	if d.config.index > 0 {
		out = append(out, d.config)
	}
	for i, e := range d.entries {
		if e.conf != nil {
			out = append(out, configAt{d.start.Index + 1 + Index(i), e.conf})
		}
	}
	return out
}

// Open recovers; the run's positions begin again.
func (d *simDisk) Open(context.Context, Identity) (Recovered, error) {
	d.staged, d.lsn = nil, 0
	rec := Recovered{HardState: d.hard, Start: d.start, Last: d.last()}
	if all := d.configs(); len(all) > 0 {
		newest := all[len(all)-1]
		rec.Config, rec.ConfigIndex, rec.older = newest.data, newest.index, all[:len(all)-1]
	}
	for i, e := range d.entries {
		if i == 0 || e.term != d.entries[i-1].term {
			rec.Runs = append(rec.Runs, EntryID{d.start.Index + 1 + Index(i), e.term})
		}
	}
	for _, k := range d.snaps.snapshots {
		rec.Snapshots = append(rec.Snapshots, k.meta)
	}
	return rec, nil
}

// tail returns the newest entries, about maxBytes of them but at least one.
func (d *simDisk) tail(maxBytes int) []Entries {
	k := len(d.entries)
	for k > 0 && (maxBytes > 0 || k == len(d.entries)) {
		k--
		maxBytes -= len(d.entries[k].raw)
	}
	if k == len(d.entries) {
		return nil
	}
	return []Entries{d.join(k, len(d.entries))}
}

func (d *simDisk) join(i, j int) Entries {
	var b []byte
	for _, e := range d.entries[i:j] {
		b = append(b, e.raw...)
	}
	e, err := ParseEntries(d.start.Index+1+Index(i), b)
	if err != nil {
		panic(err)
	}
	return e
}

func (d *simDisk) Append(s Save) {
	if want := d.lsn + LSN(len(d.staged)) + 1; s.LSN != want {
		panic(fmt.Sprintf("simDisk: save %d, want %d", s.LSN, want))
	}
	d.staged = append(d.staged, s)
}

// flushTo makes saves up to lsn durable: those that were there when the flush began.
func (d *simDisk) flushTo(lsn LSN) {
	for len(d.staged) > 0 && d.staged[0].LSN <= lsn {
		d.apply(&d.staged[0])
		d.lsn = d.staged[0].LSN
		d.staged = d.staged[1:]
	}
}

func (d *simDisk) Flush() (LSN, error) {
	if n := len(d.staged); n > 0 {
		d.flushTo(d.staged[n-1].LSN)
	}
	return d.lsn, nil
}

// crash loses what was staged, except for a prefix: the write may have been
// under way, and the disk may have finished it. Of the last save, too, only
// some parts may be there.
func (d *simDisk) crash(rng *rand.Rand) {
	d.flushTo(d.lsn + LSN(rng.IntN(len(d.staged)+1)))
	if len(d.staged) > 0 {
		parts := d.staged[0].parts()
		for _, p := range parts[:rng.IntN(len(parts)+1)] {
			d.apply(&p)
		}
	}
	d.staged = nil
}

// parts returns a save as saves of one thing each, in the order in which they
// become durable.
func (s *Save) parts() (out []Save) {
	if s.HardState != nil {
		out = append(out, Save{HardState: s.HardState})
	}
	for i := range s.Entries {
		out = append(out, Save{Entries: s.Entries[i : i+1]})
	}
	if s.Start != nil {
		out = append(out, Save{Start: s.Start, Snapshot: s.Snapshot})
	}
	return out
}

func (d *simDisk) Read(lo, hi Index, maxBytes int) ([]Entries, error) {
	if lo <= d.start.Index || hi > d.last() || lo > hi {
		return nil, fmt.Errorf("simDisk: read %d to %d of %d to %d", lo, hi, d.start.Index+1, d.last())
	}
	if lo <= d.rotten && d.rotten <= hi {
		return nil, &CorruptError{File: "simDisk", Found: fmt.Sprintf("entry %d", d.rotten), Do: doRestore}
	}
	i := int(lo - d.start.Index - 1)
	j := i
	for j <= int(hi-d.start.Index-1) && (j == i || maxBytes >= len(d.entries[j].raw)) {
		maxBytes -= len(d.entries[j].raw)
		j++
	}
	return []Entries{d.join(i, j)}, nil
}

func (d *simDisk) Close() error { return nil }

var simHashSeed = maphash.MakeSeed()

// contentHash is for comparing entries within a process; it does not enter the trace.
func contentHash(b []byte) uint64 { return maphash.Bytes(simHashSeed, b) }
