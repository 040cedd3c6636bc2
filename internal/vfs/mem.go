package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// OpKind names a file system operation for a hook.
type OpKind int

// The operations a hook sees. OpMkdir stands for the creation of one
// directory; its OpSyncDir follows.
const (
	OpCreate OpKind = iota
	OpOpen
	OpRemove
	OpRename
	OpList
	OpMkdir
	OpSyncDir
	OpLock
	OpStat
	OpRead
	OpWrite
	OpSync
	OpTruncate
)

var opNames = [...]string{"create", "open", "remove", "rename", "list", "mkdir", "syncdir", "lock", "stat", "read", "write", "sync", "truncate"}

func (k OpKind) String() string { return opNames[k] }

// Changes reports whether the operation can change what is on disk.
func (k OpKind) Changes() bool {
	switch k {
	case OpOpen, OpList, OpStat, OpRead, OpLock:
		return false
	}
	return true
}

// Op is one operation on a Mem, as its hook sees it before it happens.
type Op struct {
	Kind   OpKind
	Name   string // path; for a rename the old one
	Offset int64  // of reads and writes; for OpTruncate the new size
	Size   int    // of reads and writes, in bytes
}

// Errors of a Mem.
var (
	// ErrGone is returned by every handle that was open when the process or
	// the machine was stopped with Kill or Crash.
	ErrGone = errors.New("vfs: this handle belongs to a process that was stopped")
)

// Mem is a file system in memory, with a page cache that a power cut loses.
// It is deterministic: the same calls, with dice of the same seed, give the
// same bytes. It is safe for concurrent use.
type Mem struct {
	mu       sync.Mutex // guards everything below and every node; not held while a hook runs
	rng      *rand.Rand
	garbage  uint64 // seed of the bytes that garbage and torn sectors hold
	hook     func(Op) error
	capacity int64 // in bytes; 0: unlimited
	used     int64
	root     *memNode
	nextIno  uint64
	epoch    int // counts Kill and Crash; handles of an older epoch are dead
	open     int
	locks    map[string]bool
}

// NewMem returns an empty file system. Its dice decide what a failed write or
// sync leaves behind.
func NewMem(rng *rand.Rand) *Mem {
	m := &Mem{rng: rng, garbage: rng.Uint64(), locks: map[string]bool{}}
	m.root = m.newNode(true)
	return m
}

// SetHook installs a function that is called before each operation, without a
// lock held. It may block, which is a stall, and it may call methods of m. If
// it returns an error the operation fails with it: a failed write has reached
// the cache in part, and after a failed sync the data is readable, clean and,
// wholly or in part, not on disk. Directories are milder: after a failed
// SyncDir the first few changes are durable and the rest stay pending, because
// file systems journal them, and stop altogether when the journal fails.
func (m *Mem) SetHook(hook func(Op) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = hook
}

// SetCapacity limits the sum of all file sizes, in bytes; 0 lifts the limit.
// What would grow a file beyond it fails with ENOSPC.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = bytes
}

// Used returns the sum of all file sizes, in bytes.
func (m *Mem) Used() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

// OpenFiles returns how many files and locks are open.
func (m *Mem) OpenFiles() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.open
}

// enter runs the hook for an operation, outside the lock, and takes the lock.
// The lock is held when it returns, whatever it returns.
func (m *Mem) enter(op Op) error {
	m.mu.Lock()
	hook, epoch := m.hook, m.epoch
	if hook == nil {
		return nil
	}
	m.mu.Unlock()
	err := hook(op)
	m.mu.Lock()
	if m.epoch != epoch {
		return ErrGone
	}
	if err != nil {
		return &fs.PathError{Op: op.Kind.String(), Path: op.Name, Err: err}
	}
	return nil
}

func (m *Mem) newNode(dir bool) *memNode {
	m.nextIno++
	n := &memNode{ino: m.nextIno, dir: dir}
	if dir {
		n.live, n.disk = map[string]*memNode{}, map[string]*memNode{}
	}
	return n
}

// walk finds the node of a path, or nil.
func (m *Mem) walk(name string) *memNode {
	n := m.root
	for _, part := range strings.Split(filepath.ToSlash(filepath.Clean(name)), "/") {
		if part == "" || part == "." {
			continue
		}
		if n == nil || !n.dir {
			return nil
		}
		n = n.live[part]
	}
	return n
}

// parent finds the directory that holds name, and the last part of name.
func (m *Mem) parent(op OpKind, name string) (*memNode, string, error) {
	dir, base := filepath.Dir(filepath.Clean(name)), filepath.Base(name)
	d := m.walk(dir)
	if d == nil || !d.dir {
		return nil, "", pathError(op, name, fs.ErrNotExist)
	}
	return d, base, nil
}

func pathError(op OpKind, name string, err error) error {
	return &fs.PathError{Op: op.String(), Path: name, Err: err}
}

// Create implements FS.
func (m *Mem) Create(name string) (File, error) {
	err := m.enter(Op{Kind: OpCreate, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	d, base, err := m.parent(OpCreate, name)
	if err != nil {
		return nil, err
	}
	if d.live[base] != nil {
		return nil, pathError(OpCreate, name, fs.ErrExist)
	}
	n := m.newNode(false)
	d.change(dirOp{kind: OpCreate, name: base, node: n})
	return m.handle(name, n), nil
}

func (m *Mem) handle(name string, n *memNode) *memFile {
	m.open++
	return &memFile{m: m, name: name, node: n, epoch: m.epoch}
}

// Open implements FS.
func (m *Mem) Open(name string) (File, error) {
	err := m.enter(Op{Kind: OpOpen, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	n := m.walk(name)
	if n == nil || n.dir {
		return nil, pathError(OpOpen, name, fs.ErrNotExist)
	}
	return m.handle(name, n), nil
}

// Remove implements FS.
func (m *Mem) Remove(name string) error {
	err := m.enter(Op{Kind: OpRemove, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return err
	}
	d, base, err := m.parent(OpRemove, name)
	if err != nil {
		return err
	}
	n := d.live[base]
	if n == nil {
		return pathError(OpRemove, name, fs.ErrNotExist)
	}
	if n.dir && len(n.live) > 0 {
		return pathError(OpRemove, name, errors.New("directory not empty"))
	}
	m.used -= n.size
	d.change(dirOp{kind: OpRemove, name: base, node: n})
	return nil
}

// Rename implements FS.
func (m *Mem) Rename(oldname, newname string) error {
	if filepath.Dir(oldname) != filepath.Dir(newname) {
		return errRenameAcross
	}
	err := m.enter(Op{Kind: OpRename, Name: oldname})
	defer m.mu.Unlock()
	if err != nil {
		return err
	}
	d, base, err := m.parent(OpRename, oldname)
	if err != nil {
		return err
	}
	n, to := d.live[base], filepath.Base(newname)
	if n == nil {
		return pathError(OpRename, oldname, fs.ErrNotExist)
	}
	if old := d.live[to]; old != nil && old != n {
		if old.dir || n.dir {
			return pathError(OpRename, newname, fs.ErrExist)
		}
		m.used -= old.size
	}
	if to != base {
		d.change(dirOp{kind: OpRename, name: base, to: to, node: n})
	}
	return nil
}

// List implements FS.
func (m *Mem) List(dir string) ([]string, error) {
	err := m.enter(Op{Kind: OpList, Name: dir})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	d := m.walk(dir)
	if d == nil || !d.dir {
		return nil, pathError(OpList, dir, fs.ErrNotExist)
	}
	return sortedNames(d.live), nil
}

// MkdirAll implements FS.
func (m *Mem) MkdirAll(dir string) error { return mkdirAll(m, dir, m.mkdir) }

func (m *Mem) mkdir(dir string) error {
	err := m.enter(Op{Kind: OpMkdir, Name: dir})
	defer m.mu.Unlock()
	if err != nil {
		return err
	}
	d, base, err := m.parent(OpMkdir, dir)
	if err != nil {
		return err
	}
	if d.live[base] == nil {
		d.change(dirOp{kind: OpCreate, name: base, node: m.newNode(true)})
	}
	return nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(dir string) error {
	err := m.enter(Op{Kind: OpSyncDir, Name: dir})
	defer m.mu.Unlock()
	d := m.walk(dir)
	if err == nil && (d == nil || !d.dir) {
		err = pathError(OpSyncDir, dir, fs.ErrNotExist)
	}
	if d == nil || errors.Is(err, ErrGone) {
		return err
	}
	n := len(d.pending)
	if err != nil {
		n = m.rng.IntN(n + 1)
	}
	for _, op := range d.pending[:n] {
		op.apply(d.disk)
	}
	d.pending = append([]dirOp(nil), d.pending[n:]...)
	return err
}

// Lock implements FS.
func (m *Mem) Lock(name string) (io.Closer, error) {
	err := m.enter(Op{Kind: OpLock, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	d, base, err := m.parent(OpLock, name)
	if err != nil {
		return nil, err
	}
	key := filepath.Clean(name)
	if m.locks[key] {
		return nil, fmt.Errorf("vfs: lock %s: %w", name, ErrLocked)
	}
	if d.live[base] == nil {
		d.change(dirOp{kind: OpCreate, name: base, node: m.newNode(false)})
	}
	m.locks[key] = true
	m.open++
	return &memLock{m: m, key: key, epoch: m.epoch}, nil
}

type memLock struct {
	m     *Mem
	key   string
	epoch int
	done  bool
}

func (l *memLock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.epoch != l.m.epoch {
		return ErrGone
	}
	if l.done {
		return fs.ErrClosed
	}
	l.done = true
	l.m.open--
	delete(l.m.locks, l.key)
	return nil
}

// Stat implements FS.
func (m *Mem) Stat(name string) (Info, error) {
	err := m.enter(Op{Kind: OpStat, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return Info{}, err
	}
	n := m.walk(name)
	if n == nil {
		return Info{}, pathError(OpStat, name, fs.ErrNotExist)
	}
	return Info{Size: n.size, Inode: n.ino, Dir: n.dir}, nil
}

// memFile is an open file of a Mem.
type memFile struct {
	m      *Mem
	name   string
	node   *memNode
	epoch  int
	closed bool // guarded by m.mu
}

// enter is Mem.enter plus the check that this handle is alive.
func (f *memFile) enter(op Op) error {
	f.m.mu.Lock()
	err := f.alive()
	f.m.mu.Unlock()
	if err != nil {
		f.m.mu.Lock()
		return err
	}
	op.Name = f.name
	if err := f.m.enter(op); err != nil {
		return err
	}
	return f.alive()
}

func (f *memFile) alive() error {
	if f.epoch != f.m.epoch {
		return ErrGone
	}
	if f.closed {
		return fs.ErrClosed
	}
	return nil
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	err := f.enter(Op{Kind: OpRead, Offset: off, Size: len(p)})
	defer f.m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if off >= f.node.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), f.node.size-off))
	f.node.readAt(f.node.pages, p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.enter(Op{Kind: OpWrite, Offset: off, Size: len(p)})
	defer f.m.mu.Unlock()
	if f.alive() != nil {
		return 0, err
	}
	if err != nil { // the hook's: a part of it got through
		p = p[:min(len(p), sectorSize*f.m.rng.IntN(len(p)/sectorSize+2))]
	}
	if serr := f.m.grow(f.node, off+int64(len(p))); serr != nil {
		return 0, pathError(OpWrite, f.name, serr)
	}
	f.node.writeAt(p, off)
	return len(p), err
}

// grow makes a file at least size bytes long, if there is space.
func (m *Mem) grow(n *memNode, size int64) error {
	if size <= n.size {
		return nil
	}
	if m.capacity > 0 && m.used+size-n.size > m.capacity {
		return syscall.ENOSPC
	}
	m.used += size - n.size
	n.setSize(size)
	return nil
}

func (f *memFile) Sync() error {
	err := f.enter(Op{Kind: OpSync})
	defer f.m.mu.Unlock()
	if f.alive() != nil {
		return err
	}
	if err == nil {
		f.node.sync(func() bool { return true })
		return nil
	}
	if f.m.rng.IntN(2) == 0 {
		f.node.sync(func() bool { return false })
	} else {
		f.node.sync(func() bool { return f.m.rng.IntN(2) == 0 })
	}
	return err
}

func (f *memFile) Size() (int64, error) {
	err := f.enter(Op{Kind: OpStat})
	defer f.m.mu.Unlock()
	return f.node.size, err
}

func (f *memFile) Truncate(size int64) error {
	err := f.enter(Op{Kind: OpTruncate, Offset: size})
	defer f.m.mu.Unlock()
	if err != nil {
		return err
	}
	if err := f.m.grow(f.node, size); err != nil {
		return pathError(OpTruncate, f.name, err)
	}
	f.m.used -= f.node.size - size
	f.node.setSize(size)
	return nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.alive(); err != nil {
		return err
	}
	f.closed = true
	f.m.open--
	return nil
}

func sortedNames(entries map[string]*memNode) []string {
	names := make([]string, 0, len(entries))
	for name := range entries {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
