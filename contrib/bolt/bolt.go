// Package bolt keeps a state machine of package raft in a bbolt database, so
// that a restarted node has its state at once: it neither restores a snapshot
// nor applies the log again.
package bolt

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"example.com/raft"
)

// Machine is a raft.StateMachine, and a raft.OnDisk, over one bbolt file. Apply
// functions may use any bucket but the one called "raft".
type Machine struct {
	path  string
	apply func(tx *bbolt.Tx, e raft.Entry) ([]byte, error)

	mu sync.RWMutex // held for writing while Restore changes the file
	db *bbolt.DB
}

// apply is checked at compile time to be all that raft wants.
var (
	_ raft.StateMachine = (*Machine)(nil)
	_ raft.OnDisk       = (*Machine)(nil)
)

var metaBucket = []byte("raft") // of the library's table

// Open opens or creates the database. apply executes one command within a
// transaction and returns its result; what it refuses is a result too. Its
// error undoes the transaction, and the node applies nothing more.
func Open(path string, apply func(tx *bbolt.Tx, e raft.Entry) ([]byte, error)) (*Machine, error) {
	if err := os.Remove(path + ".restore"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("bolt: remove what an unfinished Restore left: %w", err)
	}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return nil, fmt.Errorf("bolt: open %s: %w", path, err)
	}
	return &Machine{path: path, apply: apply, db: db}, nil
}

// View runs f in a read-only transaction, which sees what was applied before.
func (m *Machine) View(f func(tx *bbolt.Tx) error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.db.View(f)
}

// Close closes the database. The node must be closed before.
func (m *Machine) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.db.Close()
}

// LoadMeta implements raft.OnDisk.
func (m *Machine) LoadMeta(each func(key, value []byte) error) error {
	return m.View(func(tx *bbolt.Tx) error {
		if b := tx.Bucket(metaBucket); b != nil {
			return b.ForEach(each)
		}
		return nil
	})
}

// change makes changes in the library's table.
func change(tx *bbolt.Tx, meta []raft.MetaChange) error {
	b, err := tx.CreateBucketIfNotExists(metaBucket)
	for _, c := range meta {
		switch {
		case err != nil:
			return err
		case c.Value == nil:
			err = b.Delete(c.Key)
		default:
			err = b.Put(c.Key, c.Value)
		}
	}
	return err
}

// replace makes meta the whole table. The one that is there came with the
// snapshot, from another node.
func replace(tx *bbolt.Tx, meta []raft.MetaChange) error {
	if err := tx.DeleteBucket(metaBucket); err != nil && !errors.Is(err, bolterrors.ErrBucketNotFound) {
		return err
	}
	return change(tx, meta)
}

// ApplyOnDisk implements raft.OnDisk: all entries, and what they change in the
// library's table, in one transaction.
func (m *Machine) ApplyOnDisk(entries []raft.Entry, results [][]byte, meta func() []raft.MetaChange) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.db.Update(func(tx *bbolt.Tx) error {
		for i, e := range entries {
			r, err := m.apply(tx, e)
			if err != nil {
				return fmt.Errorf("entry %d: %w", e.Index, err)
			}
			results[i] = slices.Clone(r) // it may point into the transaction
		}
		return change(tx, meta())
	})
}

// Snapshot captures the state by a read-only transaction.
func (m *Machine) Snapshot() (raft.Capture, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	tx, err := m.db.Begin(false)
	if err != nil {
		return nil, err
	}
	return capture{tx}, nil
}

type capture struct{ tx *bbolt.Tx }

func (c capture) WriteTo(ctx context.Context, w io.Writer) error {
	_, err := c.tx.WriteTo(&untilDone{ctx, w})
	return err
}

func (c capture) Close() { c.tx.Rollback() }

// untilDone is a writer that fails when ctx has ended.
type untilDone struct {
	ctx context.Context
	w   io.Writer
}

func (u *untilDone) Write(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.w.Write(p)
}

// RestoreOnDisk implements raft.OnDisk. The file is replaced when the new one
// is complete and synced, so that a crash leaves the one or the other.
func (m *Machine) RestoreOnDisk(r io.Reader, meta []raft.MetaChange) error {
	tmp := m.path + ".restore"
	if err := writeFile(tmp, r); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	db, err := bbolt.Open(tmp, 0o600, nil)
	if err == nil {
		err = errors.Join(db.Update(func(tx *bbolt.Tx) error { return replace(tx, meta) }), db.Close())
	}
	if err != nil {
		return errors.Join(fmt.Errorf("bolt: the snapshot is no database: %w", err), os.Remove(tmp))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.db.Close(); err != nil { // it waits for a capture that is being written
		return err
	}
	if err := os.Rename(tmp, m.path); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(m.path)); err != nil {
		return err
	}
	m.db, err = bbolt.Open(m.path, 0o600, nil)
	return err
}

func writeFile(name string, r io.Reader) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Flush(), f.Sync(), f.Close())
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Apply is not called: package raft calls ApplyOnDisk.
func (m *Machine) Apply(raft.Entry) []byte { panic("bolt: Apply of a state machine on disk") }

// Restore is not called: package raft calls RestoreOnDisk.
func (m *Machine) Restore(io.Reader) error {
	return errors.New("bolt: Restore of a state machine on disk")
}
