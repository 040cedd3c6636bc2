package raft

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
)

// Save is what one transition changed of a node's persistent state. Its parts
// become durable in the order of the fields, entries by ascending index; LSN is
// reached when all are.
type Save struct {
	LSN       LSN
	HardState *HardState    // nil: unchanged
	Entries   []Entries     // without a gap; they replace whatever the log had from their first on
	Start     *EntryID      // nil: unchanged; the log now begins after this entry
	Snapshot  *SnapshotMeta // not nil: this snapshot, which ends at Start, has replaced the log; nothing of it is kept
}

// Recovered is the state that a Storage found.
type Recovered struct {
	HardState   HardState
	Start       EntryID   // the log begins after this entry
	Last        Index     // newest entry, Start.Index if there is none
	Runs        []EntryID // first entry of each run of equal terms up to Last; the oldest may begin before the start
	Tail        []Entries // the newest entries, as far as memory should hold them; at least the last one, if there is one
	Config      []byte    // data of the newest configuration entry, nil in an unformed directory
	ConfigIndex Index
	older       []configAt      // configurations before it, which a truncation may bring back
	Snapshots   []SnapshotMeta  // complete ones, newest first
	DirectoryID [16]byte        // random, made with the directory
	Boot        uint64          // how often the storage was opened, this time included
	History     []HistoryRecord // what an operator did to the directory beside running a node, oldest first
	damaged     []error         // snapshots that were left out
}

// restoreNewest has the state restored from the newest snapshot that is not
// damaged, if the log goes on from there, and returns it: nil if everything is
// in the log. try restores one snapshot, and says whether it had begun to change
// the state; only damage makes it try an older one.
func (rec *Recovered) restoreNewest(dir string, try func(*SnapshotMeta) (begun bool, err error)) (*SnapshotMeta, error) {
	var damage error
	touched := false
	for i := range rec.Snapshots {
		meta := &rec.Snapshots[i]
		if meta.Last.Index < rec.Start.Index {
			break
		}
		begun, err := try(meta)
		if err == nil {
			return meta, nil
		}
		if corrupt := (*CorruptError)(nil); !errors.As(err, &corrupt) {
			return nil, err
		}
		touched = touched || begun
		damage = cmp.Or(damage, err)
	}
	if rec.Start.Index == 0 && !touched {
		return nil, nil
	}
	if damage == nil {
		damage = &CorruptError{File: dir, Found: fmt.Sprintf("a log that begins after entry %d, and no snapshot up to there", rec.Start.Index), Do: doRestore}
	}
	return nil, damage
}

// Identity is whose data a storage holds.
type Identity struct {
	ClusterID string
	NodeID    NodeID
}

func (id Identity) String() string {
	return fmt.Sprintf("node %q of cluster %q", id.NodeID, id.ClusterID)
}

// Storage keeps a node's term, vote and log. MemoryStorage and the directory
// of Config.Dir implement it; both pass the same contract test.
//
// Open is called once, first. Append and Read may be called at any time
// between Open and Close, also while Flush runs; saves are numbered without a
// gap from 1. After a failed Flush nothing may be written any more.
type Storage interface {
	// Open recovers what earlier runs made durable. It refuses data that is
	// damaged or somebody else's, without changing anything.
	Open(ctx context.Context, id Identity) (Recovered, error)
	// Append takes a save into memory. It never waits for a disk.
	Append(s Save)
	// Flush makes everything appended before the call durable and returns the
	// position reached. Concurrent calls combine. An error is final, unless it
	// matches ErrDiskFull: then nothing was written, what was appended is kept, and
	// Flush is called again.
	Flush() (LSN, error)
	// Read returns entries from lo to hi, at most maxBytes encoded bytes of
	// them but at least one. They must be durable and not before the start.
	Read(lo, hi Index, maxBytes int) ([]Entries, error)
	// CreateSnapshot begins to store a snapshot. Two may be written at once: the
	// node's own, and one that it receives.
	CreateSnapshot(meta SnapshotMeta) (SnapshotWriter, error)
	// OpenSnapshot opens a complete snapshot that ends with entry last. A reader
	// stays usable when newer snapshots replace what it reads.
	OpenSnapshot(last EntryID) (SnapshotMeta, SnapshotReader, error)
	// Close releases everything. It waits for a running Flush.
	Close() error
}

// spacious is a Storage whose space can run out, as a disk's does.
type spacious interface {
	// Room returns how many bytes of saves, as saveBytes counts them, may still be
	// appended and will certainly find space, and, when there can be no more for
	// lack of space, an error that matches ErrDiskFull.
	Room() (bytes int64, full error)
	// Want asks for room for n bytes, and returns at once.
	Want(n int64)
	// Claim waits until there is room for n bytes or there can't be.
	Claim(n int64)
	// OnSpace has f called whenever Room's results may have changed, from now on.
	// f must not block.
	OnSpace(f func())
}

// SnapshotWriter takes the bytes of one snapshot. One goroutine uses it. After
// an error only Abort may be called.
type SnapshotWriter interface {
	io.Writer
	// Size returns how many bytes were written.
	Size() int64
	// Sync makes what was written durable, as far as it goes, so that Commit
	// need not do it all.
	Sync() error
	// Commit makes the snapshot durable and then visible, as a whole, in place of
	// one that ends at the same entry. Of the complete snapshots the two newest
	// are kept.
	Commit() error
	// Abort forgets the snapshot. After Commit it does nothing.
	Abort() error
}

// SnapshotReader reads a complete snapshot. Every byte is verified before it is
// returned: a damaged snapshot is an error that matches *CorruptError.
type SnapshotReader interface {
	io.ReaderAt
	Size() int64 // in bytes
	Close() error
}

// keptSnapshots is how many complete snapshots a storage keeps. The older one
// is for a node whose newest is damaged and whose log reaches back to it.
const keptSnapshots = 2

// errNoSnapshot is the error of OpenSnapshot for a snapshot that there is not.
func errNoSnapshot(last EntryID) error {
	return fmt.Errorf("raft: there is no snapshot that ends with entry %d of term %d: %w", last.Index, last.Term, fs.ErrNotExist)
}

// MemoryStorage is a Storage that does not survive the process: for tests, and
// for clusters that may lose everything. A node that restarts with the same
// MemoryStorage finds what was flushed.
type MemoryStorage struct {
	mu      sync.Mutex
	id      Identity
	dirID   [16]byte
	open    bool
	staged  []Save
	lsn     LSN
	hard    HardState
	log     raftLog
	configs configList
	boot    uint64

	snapshots []*memorySnapshot // complete ones, newest first
}

// NewMemoryStorage returns an empty storage, for one node.
func NewMemoryStorage() *MemoryStorage {
	m := &MemoryStorage{}
	rand.Read(m.dirID[:])
	return m
}

// Open implements Storage. What was not flushed before is gone.
func (m *MemoryStorage) Open(_ context.Context, id Identity) (Recovered, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open {
		return Recovered{}, errors.New("raft: MemoryStorage is in use by another node; close that one first")
	}
	if m.id != (Identity{}) && m.id != id {
		return Recovered{}, &IdentityError{"MemoryStorage", m.id.String(), id.String(), "give each node its own"}
	}
	m.open, m.id, m.staged, m.lsn = true, id, nil, 0
	m.boot++
	r := Recovered{
		Boot:      m.boot,
		HardState: m.hard, Start: m.log.start, Last: m.log.last,
		Runs: slices.Clone(m.log.runs), Tail: slices.Clone(m.log.tail), DirectoryID: m.dirID,
	}
	m.configs.recovered(&r)
	for _, s := range m.snapshots {
		r.Snapshots = append(r.Snapshots, s.meta)
	}
	return r, nil
}

// Append implements Storage.
func (m *MemoryStorage) Append(s Save) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.staged = append(m.staged, s)
}

// Flush implements Storage. It returns at once.
func (m *MemoryStorage) Flush() (LSN, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.open {
		return m.lsn, ErrStopped
	}
	for _, s := range m.staged {
		if s.HardState != nil {
			m.hard = *s.HardState
		}
		for _, e := range s.Entries {
			m.log.truncate(e.First())
			m.log.append(e)
			m.configs.append(e)
		}
		if s.Start != nil {
			m.startAfter(*s.Start, s.Snapshot)
		}
		m.lsn = s.LSN
	}
	clear(m.staged)
	m.staged = m.staged[:0]
	return m.lsn, nil
}

func (m *MemoryStorage) startAfter(start EntryID, snapshot *SnapshotMeta) {
	if snapshot != nil {
		m.log.replace(start)
		m.configs = configList{{snapshot.ConfigIndex, snapshot.Config}}
		return
	}
	m.log.compact(start.Index)
	m.configs.asOf(start.Index)
}

// Read implements Storage.
func (m *MemoryStorage) Read(lo, hi Index, maxBytes int) ([]Entries, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if lo <= m.log.start.Index || hi > m.log.last || lo > hi {
		return nil, fmt.Errorf("raft: entries %d to %d are not in the log, which has %d to %d", lo, hi, m.log.start.Index+1, m.log.last)
	}
	out, _ := m.log.from(lo, hi, maxBytes)
	return out, nil
}

// Close implements Storage. Open may be called again afterwards.
func (m *MemoryStorage) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open = false
	return nil
}

// memorySnapshot is a snapshot of a MemoryStorage, and its writer and reader.
type memorySnapshot struct {
	storage *MemoryStorage
	meta    SnapshotMeta
	data    []byte
}

// CreateSnapshot implements Storage.
func (m *MemoryStorage) CreateSnapshot(meta SnapshotMeta) (SnapshotWriter, error) {
	return &memorySnapshot{storage: m, meta: meta}, nil
}

// OpenSnapshot implements Storage.
func (m *MemoryStorage) OpenSnapshot(last EntryID) (SnapshotMeta, SnapshotReader, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.snapshots {
		if s.meta.Last == last {
			return s.meta, memoryReader{bytes.NewReader(s.data)}, nil
		}
	}
	return SnapshotMeta{}, nil, errNoSnapshot(last)
}

type memoryReader struct{ *bytes.Reader }

func (memoryReader) Close() error { return nil }

func (s *memorySnapshot) Write(p []byte) (int, error) {
	s.data = append(s.data, p...)
	return len(p), nil
}

func (s *memorySnapshot) Size() int64  { return int64(len(s.data)) }
func (s *memorySnapshot) Sync() error  { return nil }
func (s *memorySnapshot) Abort() error { return nil }

func (s *memorySnapshot) Commit() error {
	m := s.storage
	m.mu.Lock()
	defer m.mu.Unlock()
	m.snapshots = slices.DeleteFunc(m.snapshots, func(o *memorySnapshot) bool { return o.meta.Last == s.meta.Last })
	m.snapshots = append(m.snapshots, s)
	slices.SortStableFunc(m.snapshots, func(a, b *memorySnapshot) int { return cmp.Compare(b.meta.Last.Index, a.meta.Last.Index) })
	m.snapshots = m.snapshots[:min(len(m.snapshots), keptSnapshots)]
	return nil
}

// configAt is the data of the configuration entry at index.
type configAt struct {
	index Index
	data  []byte
}

// configList is what a storage knows of the configurations in its log, oldest
// first; the first may be one that was compacted.
type configList []configAt

// append takes note of entries that replace whatever the log had from their first on.
func (l *configList) append(e Entries) {
	for n := len(*l); n > 0 && (*l)[n-1].index >= e.First(); n = len(*l) {
		*l = (*l)[:n-1]
	}
	for i := range e.Len() {
		if e.kind(i) == entryConfiguration {
			*l = append(*l, configAt{e.First() + Index(i), slices.Clone(e.data(i))})
		}
	}
}

// asOf returns the newest configuration at or before entry i, and forgets older ones.
func (l *configList) asOf(i Index) configAt {
	for len(*l) > 1 && (*l)[1].index <= i {
		*l = slices.Delete(*l, 0, 1)
	}
	if len(*l) == 0 || (*l)[0].index > i {
		return configAt{}
	}
	return (*l)[0]
}

// begin takes note that the log now begins after start, where conf held.
func (l *configList) begin(start Index, conf configAt) {
	*l = slices.DeleteFunc(*l, func(c configAt) bool { return c.index <= start })
	if conf.index > 0 {
		*l = slices.Insert(*l, 0, conf)
	}
}

func (l configList) recovered(r *Recovered) {
	if n := len(l); n > 0 {
		r.Config, r.ConfigIndex, r.older = l[n-1].data, l[n-1].index, slices.Clone(l[:n-1])
	}
}
