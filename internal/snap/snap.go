// Package snap keeps snapshots: each is one file of checksummed blocks, which
// gets its name only when it is complete and durable. It knows a header and
// bytes, not Raft. docs/FORMAT.md, "Snapshots", specifies what is on disk.
package snap

import (
	"encoding/binary"
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
	fs             vfs.FS
	dir, tmp, name string // directory, paths of the temporary file and of the complete one
	file           vfs.File
	closed         bool   // file has been closed
	salt           uint64 // of the file
	block          []byte // the block that gathers: room for its checksum, then data, up to its capacity
	off            int64  // where that block goes
	end            end
	err            error // why nothing more is accepted
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
	if len(header) > MaxHeaderBytes {
		return nil, fmt.Errorf("snap: a header of %d bytes: at most %d are kept; put the rest into the payload", len(header), MaxHeaderBytes)
	}
	w := &Writer{
		fs: fsys, dir: dir, name: path, tmp: strings.TrimSuffix(path, suffix) + tmpSuffix,
		salt:  salt,
		block: make([]byte, sumSize, sumSize+blockSize),
	}
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("snap: create the directory of snapshots: %w", err)
	}
	if err := fsys.Remove(w.tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("snap: remove what an earlier attempt left: %w", err)
	}
	if w.file, err = fsys.Create(w.tmp); err != nil {
		return nil, fmt.Errorf("snap: create a temporary file: %w", err)
	}
	h := head{version: formatVersion, salt: salt, blockSize: uint32(blockSize), header: uint32(len(header)), headerCRC: checksum(0, header)}
	first := h.encode()
	w.end.sums = checksum(0, first[8:12])
	if err := w.put(append(first, header...)); err != nil {
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
	w.err = fmt.Errorf("snap: %s %s: %w; this snapshot is lost: abort it, see to the disk, begin another one", what, w.tmp, err)
	return w.err
}

// put writes to the end of the file.
func (w *Writer) put(p []byte) error {
	if _, err := w.file.WriteAt(p, w.off); err != nil {
		return w.fail("write", err)
	}
	w.off += int64(len(p))
	return nil
}

// putBlock writes the block that has gathered.
func (w *Writer) putBlock() error {
	sum := w.block[:sumSize]
	binary.LittleEndian.PutUint32(sum, checksum(placed(w.salt, w.off), w.block[sumSize:]))
	w.end.sums = checksum(w.end.sums, sum)
	w.end.blocks++
	err := w.put(w.block)
	w.block = sum
	return err
}

// Write adds to the payload. It gathers blocks and writes whole ones; nothing
// is durable before Commit. After an error every further call returns it.
func (w *Writer) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	for n := 0; n < len(p); {
		k := min(len(p)-n, cap(w.block)-len(w.block))
		w.block = append(w.block, p[n:n+k]...)
		n += k
		w.end.size += uint64(k)
		if len(w.block) == cap(w.block) {
			if err := w.putBlock(); err != nil {
				return n, err
			}
		}
	}
	return len(p), nil
}

// Size returns how much payload has been written so far, in bytes.
func (w *Writer) Size() int64 { return int64(w.end.size) }

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
	if w.err != nil {
		return w.err
	}
	if len(w.block) > sumSize {
		if err := w.putBlock(); err != nil {
			return err
		}
	}
	if err := w.put(w.end.encode(w.salt, w.off)); err != nil {
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
