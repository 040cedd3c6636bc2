// Package snap keeps snapshots: each is one file of checksummed blocks, which
// gets its name only when it is complete and durable. It knows a header and
// bytes, not Raft. docs/FORMAT.md, "Snapshots", specifies what is on disk.
package snap

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"example.com/raft/internal/vfs"
)

const (
	suffix    = ".snap"     // of complete snapshots
	tmpSuffix = ".snap.tmp" // of those that are being written
)

var errDone = errors.New("snap: this snapshot is committed or aborted already; begin another one with Create")

// Writer writes one snapshot. It may be used by one goroutine at a time.
type Writer struct {
	*Encoder
	fs             vfs.FS
	dir, tmp, name string // directory, paths of the temporary file and of the complete one
	file           vfs.File
	closed         bool // file has been closed
}

// Create begins a snapshot, under a temporary name in a directory that is made
// if it is missing. What a crash left under that name is replaced. header, of
// at most MaxHeaderBytes, is kept beside the payload; the caller gives it its
// meaning. salt is random: it tells this file's blocks from those of others.
// The caller ends the Writer with Commit or Abort; there may be one per name at
// a time.
func Create(fs vfs.FS, dir, name string, header []byte, salt uint64) (*Writer, error) {
	return create(fs, dir, name, header, salt, blockSize)
}

// create is Create with a block size that tests choose.
func create(fsys vfs.FS, dir, name string, header []byte, salt uint64, blockSize int) (*Writer, error) {
	path, err := pathOf(dir, name)
	if err != nil {
		return nil, err
	}
	w := &Writer{fs: fsys, dir: dir, name: path, tmp: strings.TrimSuffix(path, suffix) + tmpSuffix}
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("snap: create the directory of snapshots: %w", err)
	}
	if err := fsys.Remove(w.tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("snap: remove what an earlier attempt left: %w", err)
	}
	if w.file, err = fsys.Create(w.tmp); err != nil {
		return nil, fmt.Errorf("snap: create a temporary file: %w", err)
	}
	if w.Encoder, err = newEncoder(&tail{w: w}, header, salt, blockSize); err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	return w, nil
}

// pathOf is the path of a complete snapshot.
func pathOf(dir, name string) (string, error) {
	if name == "" || strings.ContainsAny(name, `/\`) {
		return "", fmt.Errorf("snap: %q is no name of a snapshot; it must not be empty or hold a slash", name)
	}
	return filepath.Join(dir, name+suffix), nil
}

// fail stops the Writer for good: after a failed write or sync nobody knows
// what the file holds, and a later sync that succeeds would not tell.
func (w *Writer) fail(what string, err error) error {
	w.err = w.failure(what, err)
	return w.err
}

func (w *Writer) failure(what string, err error) error {
	return fmt.Errorf("snap: %s %s: %w; this snapshot is lost: abort it, see to the disk, begin another one", what, w.tmp, err)
}

// tail is the end of a Writer's file.
type tail struct {
	w   *Writer
	off int64
}

func (t *tail) Write(p []byte) (int, error) {
	n, err := t.w.file.WriteAt(p, t.off)
	t.off += int64(n)
	if err != nil {
		return n, t.w.failure("write", err)
	}
	return n, nil
}

// Sync makes the whole blocks written so far durable. It is only there to
// shorten the sync in Commit; a crash loses the snapshot all the same.
func (w *Writer) Sync() error {
	if w.err != nil {
		return w.err
	}
	if err := w.file.Sync(); err != nil {
		return w.fail("sync", err)
	}
	return nil
}

// Commit completes the snapshot, makes it durable, and gives it its name, in
// place of an older one of that name. If it returns nil, the snapshot is
// durable. If it returns an error, the name stands for what it stood for
// before or, where only the sync of the directory failed, for the new snapshot,
// which is whole, though a power cut may take it back.
func (w *Writer) Commit() error {
	if err := w.Finish(); err != nil {
		return err
	}
	if err := w.Sync(); err != nil {
		return err
	}
	w.closed = true
	if err := w.file.Close(); err != nil {
		return w.fail("close", err)
	}
	if err := w.fs.Rename(w.tmp, w.name); err != nil {
		return w.fail("rename", err)
	}
	if err := w.fs.SyncDir(w.dir); err != nil {
		return w.fail("sync the directory after the rename of", err)
	}
	w.err = errDone
	return nil
}

// Abort closes and removes the temporary file. It does nothing after Commit
// has returned nil, or after Abort, so that it may be deferred. If it cannot
// remove the file, Clean can later.
func (w *Writer) Abort() error {
	if w.err == errDone {
		return nil
	}
	w.err = errDone
	var closing error
	if !w.closed {
		closing = w.file.Close()
	}
	err := w.fs.Remove(w.tmp)
	if errors.Is(err, fs.ErrNotExist) { // Commit renamed it, and failed after that
		err = nil
	}
	if err := errors.Join(closing, err); err != nil {
		return fmt.Errorf("snap: abort %s: %w; Clean removes what is left", w.tmp, err)
	}
	return nil
}

// List returns the names of the complete snapshots in a directory, sorted. A
// directory that does not exist has none.
func List(fs vfs.FS, dir string) ([]string, error) { return list(fs, dir, suffix) }

func list(fsys vfs.FS, dir, suffix string) (names []string, err error) {
	files, err := fsys.List(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("snap: list %s: %w", dir, err)
	}
	for _, file := range files {
		if name, ok := strings.CutSuffix(file, suffix); ok && name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names) // "a.snap" is after "a-b.snap", and "a" before "a-b"
	return names, nil
}

// Clean removes the temporary files that crashes have left. No Writer may be
// at work in the directory. A power cut may bring them back, to be removed by
// the next Clean.
func Clean(fs vfs.FS, dir string) error {
	names, err := list(fs, dir, tmpSuffix)
	if err != nil || len(names) == 0 {
		return err
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, fs.Remove(filepath.Join(dir, name+tmpSuffix)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("snap: remove temporary files: %w", err)
	}
	return nil
}

// Remove removes a snapshot; if it returns nil, durably. It may be open: its
// Reader goes on. A name that does not exist gives an error that matches
// fs.ErrNotExist.
func Remove(fs vfs.FS, dir, name string) error {
	path, err := pathOf(dir, name)
	if err != nil {
		return err
	}
	if err := fs.Remove(path); err != nil {
		return fmt.Errorf("snap: remove a snapshot: %w", err)
	}
	if err := fs.SyncDir(dir); err != nil {
		return fmt.Errorf("snap: sync %s, from which %s was removed; it may be there again after a crash: %w", dir, name, err)
	}
	return nil
}
