package raft

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"example.com/raft/internal/snap"
	"example.com/raft/internal/vfs"
)

// snapshotStore is the part of a data directory that holds snapshots: one file
// each, whose header is a SnapshotMeta (docs/FORMAT.md, "Snapshots").
type snapshotStore struct {
	storage *diskStorage
	dir     string

	mu    sync.Mutex // held while the directory changes; no step waits for it
	metas []SnapshotMeta
}

// open finds the complete snapshots and removes what a crash left of others.
// One whose header can't be read is left out: recovery falls back to an older
// one, or refuses.
func (t *snapshotStore) open() ([]SnapshotMeta, error) {
	fs := t.storage.fs
	t.metas = nil
	if err := snap.Clean(fs, t.dir); err != nil {
		return nil, fmt.Errorf("raft: clean %s: %w", t.dir, err)
	}
	names, err := snap.List(fs, t.dir)
	if err == nil && len(names) > 0 {
		// A process that was killed between renaming and syncing has left a
		// snapshot that a power cut would take away. It is relied on from now on.
		err = fs.SyncDir(t.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("raft: list %s: %w", t.dir, err)
	}
	for _, name := range names {
		meta, r, err := t.read(name)
		if corrupt := (*CorruptError)(nil); errors.As(err, &corrupt) {
			continue // it stays for whoever examines it, until newer ones replace it
		}
		if err != nil {
			return nil, err
		}
		r.Close()
		t.metas = append(t.metas, meta)
	}
	t.sort()
	return slices.Clone(t.metas), nil
}

// dropDamaged reads the newest snapshot if the log can do without it: because it
// would replace the log, or because the log begins with the first entry. A
// damaged one is left out, as one whose header can't be read is, before the log
// is given up for it or half of its state is restored.
func (d *diskStorage) dropDamaged(ctx context.Context, rec *Recovered) error {
	t := &d.snapshots
	for len(rec.Snapshots) > 0 && (rec.Start.Index == 0 || rec.replacement() != nil) {
		_, _, err := t.verify(ctx, snapshotName(&rec.Snapshots[0]))
		if corrupt := (*CorruptError)(nil); !errors.As(err, &corrupt) {
			return err
		}
		rec.damaged = append(rec.damaged, err)
		rec.Snapshots, t.metas = rec.Snapshots[1:], t.metas[1:]
	}
	return nil
}

// verify reads all of a snapshot, whose state has the size that it returns.
func (t *snapshotStore) verify(ctx context.Context, name string) (meta SnapshotMeta, size int64, err error) {
	meta, f, err := t.read(name)
	if err != nil {
		return meta, 0, err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, &contextReader{ctx: ctx, r: io.NewSectionReader(f, 0, f.Size())})
	return meta, f.Size(), err
}

func (t *snapshotStore) sort() {
	slices.SortFunc(t.metas, func(a, b SnapshotMeta) int { return cmp.Compare(b.Last.Index, a.Last.Index) })
}

func (t *snapshotStore) read(name string) (SnapshotMeta, *snapshotFile, error) {
	r, err := snap.Open(t.storage.fs, t.dir, name)
	if err != nil {
		return SnapshotMeta{}, nil, t.storage.explain(err)
	}
	meta, err := decodeSnapshotMeta(r.Header())
	if err == nil && snapshotName(&meta) != name {
		err = fmt.Errorf("the header of snapshot %s", snapshotName(&meta))
	}
	if err != nil {
		r.Close()
		return meta, nil, &CorruptError{File: filepath.Join(t.dir, name), Found: err.Error(), Do: doRestore}
	}
	return meta, &snapshotFile{r, t.storage}, nil
}

// snapshotName sorts by the index of the last entry. The ID keeps apart what a
// node took and what it received.
func snapshotName(m *SnapshotMeta) string {
	return fmt.Sprintf("%020d-%d-%x", m.Last.Index, m.Last.Term, m.ID[:8])
}

// CreateSnapshot implements Storage.
func (d *diskStorage) CreateSnapshot(meta SnapshotMeta) (SnapshotWriter, error) {
	var salt [8]byte
	d.random(salt[:])
	w, err := snap.Create(d.fs, d.snapshots.dir, snapshotName(&meta), meta.encode(nil), binary.LittleEndian.Uint64(salt[:]))
	if err != nil {
		d.snapshots.makeSpace(err)
		return nil, fmt.Errorf("raft: begin a snapshot in %s: %w", d.snapshots.dir, err)
	}
	return &snapshotFileWriter{w, d, meta}, nil
}

// makeSpace gives a snapshot that found none a better chance when it is tried
// again: it removes segments that were kept to be used again, and the older one
// of two snapshots. What else is there is needed.
func (t *snapshotStore) makeSpace(err error) {
	if !vfs.IsNoSpace(err) || t.storage.log == nil { // a restore has nothing to give up
		return
	}
	_ = t.storage.log.DropSpares() // what it can't remove stays
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.keep(1)
}

// OpenSnapshot implements Storage.
func (d *diskStorage) OpenSnapshot(last EntryID) (SnapshotMeta, SnapshotReader, error) {
	t := &d.snapshots
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.metas {
		if t.metas[i].Last == last {
			meta, r, err := t.read(snapshotName(&t.metas[i]))
			if err != nil {
				return meta, nil, err
			}
			return meta, r, nil
		}
	}
	return SnapshotMeta{}, nil, errNoSnapshot(last)
}

// snapshotFileWriter writes one snapshot file.
type snapshotFileWriter struct {
	*snap.Writer
	storage *diskStorage
	meta    SnapshotMeta
}

// Commit makes the snapshot durable and visible, and only then removes older
// ones: a power cut leaves those that the log may need.
func (w *snapshotFileWriter) Commit() error {
	t := &w.storage.snapshots
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := w.Writer.Commit(); err != nil {
		if vfs.IsNoSpace(err) {
			_ = t.keep(1) // see makeSpace
		}
		return fmt.Errorf("raft: store a snapshot in %s: %w", t.dir, err)
	}
	// One that ends at the same entry may be damaged: that is why this was taken.
	t.metas = slices.DeleteFunc(t.metas, func(m SnapshotMeta) bool { return m.Last == w.meta.Last })
	t.metas = append(t.metas, w.meta)
	t.sort()
	// It is stored, whatever becomes of the older ones: whoever is told otherwise
	// goes on to rely on one of those.
	if err := t.keep(keptSnapshots); err != nil && w.storage.onKept != nil {
		w.storage.onKept(err)
	}
	return nil
}

// Write and Sync are snap.Writer's.
func (w *snapshotFileWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.storage.snapshots.makeSpace(err)
	return n, err
}

func (w *snapshotFileWriter) Sync() error {
	err := w.Writer.Sync()
	w.storage.snapshots.makeSpace(err)
	return err
}

// keep removes all snapshots but the newest n. mu is held.
func (t *snapshotStore) keep(n int) error {
	keep := map[string]bool{}
	for i := range t.metas[:min(len(t.metas), n)] {
		keep[snapshotName(&t.metas[i])] = true
	}
	t.metas = t.metas[:min(len(t.metas), n)]
	names, err := snap.List(t.storage.fs, t.dir)
	for _, name := range names {
		if err == nil && !keep[name] {
			err = snap.Remove(t.storage.fs, t.dir, name)
		}
	}
	if err != nil {
		return fmt.Errorf("raft: remove an old snapshot from %s: %w", t.dir, err)
	}
	return nil
}

// snapshotFile reads one snapshot file.
type snapshotFile struct {
	*snap.Reader
	storage *diskStorage
}

func (f *snapshotFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.Reader.ReadAt(p, off)
	return n, f.storage.explain(err)
}

const snapshotMetaVersion = 1

// encode appends what a snapshot's header says, on disk and on the wire.
func (m *SnapshotMeta) encode(b []byte) []byte {
	b = append(append(b, snapshotMetaVersion), m.ID[:]...)
	b = appendUint64s(b, uint64(m.Last.Index), uint64(m.Last.Term), nanoseconds(m.Time), uint64(m.ConfigIndex), m.Sessions)
	return append(b, m.Config...)
}

var errSnapshotMeta = errors.New("raft: snapshot header is malformed")

func decodeSnapshotMeta(b []byte) (m SnapshotMeta, err error) {
	r := reader{b: b}
	version := r.byte()
	copy(m.ID[:], r.bytes(16))
	m.Last, m.Time, m.ConfigIndex = r.entryID(), time.Unix(0, int64(r.uint64())).UTC(), Index(r.uint64())
	m.Sessions = r.uint64()
	if r.err != nil || version != snapshotMetaVersion || m.Last.Index == 0 || m.Last.Index > math.MaxInt64 || m.ConfigIndex > m.Last.Index {
		return SnapshotMeta{}, errSnapshotMeta
	}
	m.Config = slices.Clone(r.b)
	if _, err := decodeConfiguration(m.Config); err != nil {
		return SnapshotMeta{}, err
	}
	return m, nil
}
