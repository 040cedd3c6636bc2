package raft

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"example.com/raft/internal/snap"
	"example.com/raft/internal/vfs"
	"example.com/raft/internal/wal"
)

// Kinds of records in the write-ahead log (docs/FORMAT.md, "Records written by raft").
const (
	recordHardState byte = 1 // carried into every segment
	recordEntries   byte = 2
	recordStart     byte = 3 // carried into every segment
	recordBoot      byte = 4 // carried into every segment
	recordHistory   byte = 5 // carried into every segment
)

// diskStorage is the Storage of Config.Dir: an identity file and a write-ahead
// log. It holds no entries in memory, only where each run of them is.
type diskStorage struct {
	fs        vfs.FS
	dir       string
	adopt     bool // take over a directory that was copied
	copied    bool // it was copied, and is being taken over
	first     bool // its first start has not come to its end
	tailBytes int  // of entries given to the core at Open
	options   wal.Options
	random    func(b []byte) // fills b, for the directory ID and the salts of snapshots
	lock      io.Closer
	log       *wal.Log
	snapshots snapshotStore
	onSpace   atomic.Pointer[func()]
	onKept    func(error) // told that an old snapshot could not be removed; nil, or set before Open

	// copying is held while staged saves are copied into the log's buffer, so
	// that they get there in order. It is locked before mu.
	copying sync.Mutex

	mu      sync.Mutex
	staged  []Save
	bytes   int64   // of what is staged, as saveBytes counts
	taken   LSN     // the newest save in the log's buffer
	release wal.LSN // before this position the log is not needed, once taken is durable
	spans   []entrySpan
	configs configList
	start   EntryID

	// During Open:
	gap         bool // entries were read whose predecessors are gone
	newestStart EntryID
	newestConf  configAt // at newestStart
	startsAnew  bool     // nothing was read since newestStart
}

// entrySpan says where consecutive entries are: in the record at lsn, which
// begins with entry first. Entries after last were truncated later.
type entrySpan struct {
	first, last Index
	lsn         wal.LSN
	size        int // bytes of the record
}

func newDiskStorage(c *Config) *diskStorage {
	return &diskStorage{
		fs: vfs.OS(), dir: c.Dir, adopt: c.AdoptDir, tailBytes: c.MaxLogMemoryBytes,
		options: wal.Options{MaxSegmentBytes: c.MaxSegmentBytes &^ 4095},
		random:  func(b []byte) { rand.Read(b) },
	}
}

func (d *diskStorage) Open(ctx context.Context, id Identity) (Recovered, error) {
	rec, err := d.open(ctx, id)
	if err != nil {
		return rec, err
	}
	if err = d.settleIdentity(rec.DirectoryID, id); err != nil {
		return rec, errors.Join(err, d.Close())
	}
	return rec, nil
}

// open is Open without settleIdentity.
func (d *diskStorage) open(ctx context.Context, id Identity) (rec Recovered, err error) {
	if err := d.fs.MkdirAll(d.dir); err != nil {
		return rec, fmt.Errorf("raft: make data directory %s: %w", d.dir, err)
	}
	if err := d.takeLock(); err != nil {
		return rec, err
	}
	defer func() {
		if err != nil && d.log != nil {
			d.log.Close()
		}
		if err != nil {
			d.lock.Close()
		}
	}()
	if rec.DirectoryID, err = d.openIdentity(id); err != nil {
		return rec, err
	}
	var l raftLog
	err = d.openLog(ctx, rec.DirectoryID, func(lsn wal.LSN, r wal.Record) error {
		return d.replay(&rec, &l, lsn, r)
	})
	if err != nil {
		return rec, d.explain(err)
	}
	if err = d.replayed(&l); err != nil {
		return rec, err
	}
	if err = d.countBoot(&rec); err != nil {
		return rec, err
	}
	if rec.Snapshots, err = d.snapshots.open(); err != nil {
		return rec, err
	}
	d.recovered(&rec, &l)
	return rec, d.dropDamaged(ctx, &rec)
}

// recovered gives out what was replayed.
func (d *diskStorage) recovered(rec *Recovered, l *raftLog) {
	rec.Start, rec.Last, rec.Runs, rec.Tail = l.start, l.last, l.runs, l.tail
	d.start = l.start
	d.configs.recovered(rec)
}

// replayed is called when all records were replayed: now it shows where the log starts.
func (d *diskStorage) replayed(l *raftLog) error {
	if d.gap && d.startsAnew {
		// It is before the oldest entry, and yet what is between them was
		// released: a snapshot has replaced the log, and nothing has followed.
		*l = newRaftLog(EntryID{Index: d.newestStart.Index}, d.newestStart.Index, nil, nil)
		d.spans, d.configs = nil, nil
		d.replayStart(l, d.newestStart, d.newestConf)
	}
	if d.gap {
		return &CorruptError{File: d.options.Dir, Found: fmt.Sprintf("a log whose oldest entry is %d, without a record of where it starts", l.start.Index+1), Do: doRestore}
	}
	return nil
}

func (d *diskStorage) lockFile() string { return filepath.Join(d.dir, "lock") }

// layOut says where the parts of the directory are.
func (d *diskStorage) layOut() {
	d.options.FS, d.options.Dir = d.fs, filepath.Join(d.dir, "wal")
	d.options.Carry = []byte{recordHardState, recordStart, recordBoot, recordHistory}
	d.snapshots = snapshotStore{storage: d, dir: filepath.Join(d.dir, "snap")}
}

// takeLock takes the directory, which must exist, for this storage alone.
func (d *diskStorage) takeLock() (err error) {
	d.layOut()
	d.lock, err = d.fs.Lock(d.lockFile())
	if errors.Is(err, vfs.ErrLocked) {
		return &InUseError{Dir: d.dir, Err: err}
	}
	if err != nil {
		return fmt.Errorf("raft: lock data directory %s: %w", d.dir, err)
	}
	return nil
}

// openLog opens the write-ahead log of the directory with this ID.
func (d *diskStorage) openLog(ctx context.Context, dirID [16]byte, replay func(wal.LSN, wal.Record) error) (err error) {
	d.options.Tag = dirID
	d.options.Begun = !d.first
	d.options.OnSpace = d.spaceChanged
	d.log, err = wal.Open(ctx, d.options, replay)
	return err
}

// countBoot makes it durable that the node was started once more. A directory
// that was rolled back counts fewer starts than its peers remember.
func (d *diskStorage) countBoot(rec *Recovered) error {
	rec.Boot++
	d.log.Append(wal.Record{Kind: recordBoot, Data: appendUint64s(nil, rec.Boot)})
	if err := d.log.Flush(); err != nil {
		return fmt.Errorf("raft: the log of %s can't be written: %w", d.dir, err)
	}
	return nil
}

// replay takes one record of the log, oldest first.
func (d *diskStorage) replay(rec *Recovered, l *raftLog, lsn wal.LSN, r wal.Record) error {
	malformed := func(what string, err error) error {
		return &CorruptError{File: d.options.Dir, Found: fmt.Sprintf("a record of %s that can't be read (%v), at position %d", what, err, lsn), Do: doRestore}
	}
	f := reader{b: r.Data}
	switch r.Kind {
	case recordHardState:
		if err := rec.HardState.decode(r.Data); err != nil {
			return malformed("the hard state", err)
		}
	case recordBoot:
		rec.Boot = f.uint64()
		if err := f.finish(); err != nil {
			return malformed("the boot counter", err)
		}
	case recordHistory:
		var err error
		if rec.History, err = decodeHistory(r.Data); err != nil {
			return malformed("the directory's history", err)
		}
	case recordStart:
		start, conf := f.entryID(), configAt{index: Index(f.uint64())}
		conf.data = slices.Clone(f.b)
		if f.err != nil {
			return malformed("the log's start", f.err)
		}
		d.replayStart(l, start, conf)
	case recordEntries:
		if len(r.Data) < entryHeaderBytes {
			return malformed("entries", errShort)
		}
		e, err := ParseEntries(Index(binary.LittleEndian.Uint64(r.Data[8:])), slices.Clone(r.Data))
		if err != nil {
			return malformed("entries", err)
		}
		if !d.gap && e.Last() <= l.start.Index {
			return nil // forgotten since
		}
		if !d.gap && e.First() <= l.start.Index {
			e = e.slice(int(l.start.Index-e.First())+1, e.Len())
		}
		if e.First() > l.last+1 || e.First() <= l.start.Index {
			// What was before it is in segments that were released, so a record
			// follows that the log starts later, unless a snapshot has replaced
			// the log right before it. Until then the start is a guess.
			d.gap = true
			*l = newRaftLog(EntryID{Index: e.First() - 1}, e.First()-1, nil, nil)
			d.spans = nil
			if d.newestStart.Index == l.start.Index {
				d.replayStart(l, d.newestStart, d.newestConf)
			}
		}
		d.startsAnew = false
		l.truncate(e.First())
		l.append(e)
		l.evict(d.tailBytes, l.last)
		d.index(e, lsn, len(r.Data))
	default:
		return malformed(fmt.Sprintf("unknown kind %d", r.Kind), errors.New("a newer release may have written it"))
	}
	return nil
}

func (d *diskStorage) replayStart(l *raftLog, start EntryID, conf configAt) {
	if start.Index > d.newestStart.Index {
		d.newestStart, d.newestConf, d.startsAnew = start, conf, true
	}
	switch {
	case start.Index < l.start.Index || start.Index == l.start.Index && !d.gap:
		return
	case start.Index == l.start.Index:
		l.beginAfter(start) // the guess was right; now its term is known
	case l.matches(start):
		l.compact(start.Index)
	default: // a snapshot has replaced the log
		*l = newRaftLog(start, start.Index, nil, nil)
		d.spans, d.configs = nil, nil
	}
	d.gap = false
	d.start = start
	d.configs.begin(start.Index, conf)
	d.forget(start.Index)
}

// index notes where entries are, and drops what they replace.
func (d *diskStorage) index(e Entries, lsn wal.LSN, size int) {
	for n := len(d.spans); n > 0 && d.spans[n-1].last >= e.First(); n = len(d.spans) {
		if d.spans[n-1].first < e.First() {
			d.spans[n-1].last = e.First() - 1
			break
		}
		d.spans = d.spans[:n-1]
	}
	d.spans = append(d.spans, entrySpan{e.First(), e.Last(), lsn, size})
	d.configs.append(e)
}

// forget drops the index of entries up to i.
func (d *diskStorage) forget(i Index) {
	n := 0
	for n < len(d.spans) && d.spans[n].last <= i {
		n++
	}
	d.spans = slices.Delete(d.spans, 0, n)
}

func (d *diskStorage) Append(s Save) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.staged = append(d.staged, s)
	d.bytes += bytesOf(&s)
}

// bytesOf is what a save takes in the log.
func bytesOf(s *Save) (n int64) {
	if s.HardState != nil {
		n += saveOverhead + 24
	}
	for _, e := range s.Entries {
		n += saveBytes(e)
	}
	return n
}

// Room, Want, Claim and OnSpace implement spacious.
func (d *diskStorage) Room() (bytes int64, full error) {
	staged := d.uncopied() // asked first: what is copied meanwhile is counted twice, and not left out
	bytes, full = d.log.Room()
	if full != nil {
		full = fmt.Errorf("%w: %w", ErrDiskFull, full)
	}
	return max(0, bytes-staged), full
}

func (d *diskStorage) uncopied() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bytes
}

func (d *diskStorage) Want(n int64) { d.log.Want(n + d.uncopied()) }

// The error of Claim is left to Room, and to the write.
func (d *diskStorage) Claim(n int64) { _ = d.log.Claim(n + d.uncopied()) }

func (d *diskStorage) OnSpace(f func()) { d.onSpace.Store(&f) }

func (d *diskStorage) spaceChanged() {
	if f := d.onSpace.Load(); f != nil {
		(*f)()
	}
}

func (d *diskStorage) Flush() (LSN, error) {
	lsn, release := d.stage()
	err := d.log.Flush()
	if errors.Is(err, wal.ErrDiskFull) && !errors.Is(err, wal.ErrFailed) {
		return 0, fmt.Errorf("%w: %w", ErrDiskFull, err)
	}
	if err != nil {
		return 0, fmt.Errorf("raft: the log can't be written any more, so this node stops; check the disk of %s: %w", d.dir, err)
	}
	if release > 0 {
		d.log.Release(release)
	}
	return lsn, nil
}

// stage copies what was appended into the log's buffer. It returns the newest
// save there, and before which position the log is not needed any more.
func (d *diskStorage) stage() (lsn LSN, release wal.LSN) {
	d.copying.Lock()
	defer d.copying.Unlock()
	d.mu.Lock()
	saves, bytes := d.staged, d.bytes
	d.staged = nil
	d.mu.Unlock()
	for i := range saves {
		release = max(release, d.stageOne(&saves[i]))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bytes -= bytes
	d.release = max(d.release, release)
	return d.taken, d.release
}

// encode leaves out a promise that was never made, so that a release which knows
// of none reads the directory of a cluster without leases.
func (h *HardState) encode() []byte {
	b := appendUint64s(nil, uint64(h.Term), h.VotedFor)
	if h.LeasePromise > 0 {
		b = appendUint64s(b, uint64(h.LeasePromise))
	}
	return b
}

func (h *HardState) decode(b []byte) error {
	r := reader{b: b}
	*h = HardState{Term: Term(r.uint64()), VotedFor: r.uint64()}
	if len(r.b) == 0 {
		return r.finish()
	}
	if p := r.uint64(); p > 0 && p <= uint64(maxLeasePromise) {
		h.LeasePromise = time.Duration(p)
	} else if r.err == nil {
		r.err = fmt.Errorf("a promise of %d ns", p)
	}
	return r.finish()
}

func (d *diskStorage) stageOne(s *Save) (release wal.LSN) {
	recs := make([]wal.Record, 0, 2+len(s.Entries))
	if s.HardState != nil {
		recs = append(recs, wal.Record{Kind: recordHardState, Data: s.HardState.encode()})
	}
	for _, e := range s.Entries {
		recs = append(recs, wal.Record{Kind: recordEntries, Data: e.Encoded()})
	}
	if s.Start != nil {
		d.mu.Lock()
		if s.Snapshot != nil {
			d.spans, d.configs = nil, configList{{s.Snapshot.ConfigIndex, s.Snapshot.Config}}
		}
		conf := d.configs.asOf(s.Start.Index)
		d.mu.Unlock()
		data := appendUint64s(nil, uint64(s.Start.Index), uint64(s.Start.Term), uint64(conf.index))
		recs = append(recs, wal.Record{Kind: recordStart, Data: data, Parts: [][]byte{conf.data}})
	}
	last := wal.LSN(0)
	lsns := make([]wal.LSN, len(recs))
	for i := range recs {
		// One call per record gives each one's position; nobody flushes between,
		// because copying is held.
		lsns[i] = d.log.Append(recs[i])
		last = lsns[i]
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, r := range recs {
		if r.Kind == recordEntries {
			e := s.Entries[0]
			s.Entries = s.Entries[1:]
			d.index(e, lsns[i], len(r.Data))
		}
	}
	d.taken = s.LSN
	if s.Start == nil {
		return 0
	}
	d.start = *s.Start
	d.forget(s.Start.Index)
	if len(d.spans) > 0 {
		return d.spans[0].lsn
	}
	return last
}

func (d *diskStorage) Read(lo, hi Index, maxBytes int) ([]Entries, error) {
	var out []Entries
	for lo <= hi && maxBytes > 0 {
		d.mu.Lock()
		k := sort.Search(len(d.spans), func(k int) bool { return d.spans[k].last >= lo })
		if k == len(d.spans) || d.spans[k].first > lo || lo <= d.start.Index {
			d.mu.Unlock()
			if len(out) > 0 {
				break
			}
			return nil, fmt.Errorf("raft: entry %d is not in the log", lo)
		}
		span := d.spans[k]
		d.mu.Unlock()
		r, err := d.log.ReadAt(span.lsn, make([]byte, 0, span.size+64))
		if err != nil {
			return nil, d.explain(err)
		}
		e, err := ParseEntries(span.first, r.Data)
		if err != nil {
			return nil, &CorruptError{File: d.options.Dir, Found: fmt.Sprintf("entries from %d on that can't be read (%v)", span.first, err), Do: doRestore}
		}
		e = e.slice(int(lo-span.first), int(min(span.last, hi)-span.first)+1).upTo(maxBytes)
		if len(out) > 0 && e.size() > maxBytes {
			break
		}
		out = append(out, e)
		maxBytes -= e.size()
		lo = e.Last() + 1
	}
	return out, nil
}

// Seal proves the newest batch, so that damage to it can be told from a crash.
func (d *diskStorage) Seal() error { return d.log.Seal() }

func (d *diskStorage) Close() error {
	if d.log == nil {
		return nil
	}
	return errors.Join(d.log.Close(), d.lock.Close())
}

const doRestore = "restore this directory from a backup, or remove this node from the cluster and add it again with an empty directory; nothing was changed"

const doEmpty = "if a backup was being restored here, empty the directory and restore it again; otherwise " + doRestore

// explain turns the log's errors into this package's.
func (d *diskStorage) explain(err error) error {
	var corrupt *wal.CorruptError
	var version *wal.VersionError
	var tag *wal.TagError
	var damaged *snap.CorruptError
	var newer *snap.VersionError
	switch {
	case errors.As(err, &damaged):
		return &CorruptError{File: damaged.File, Offset: damaged.Offset, Found: damaged.Found, Do: doRestore}
	case errors.As(err, &newer):
		return &IdentityError{newer.File, fmt.Sprintf("format version %d", newer.Found), fmt.Sprintf("at most %d", newer.Max), "run the release that wrote it, or a later one; nothing was changed"}
	case errors.As(err, &corrupt):
		return &CorruptError{File: corrupt.File, Offset: corrupt.Offset, Found: corrupt.Found, Do: corrupt.Do}
	case errors.As(err, &version):
		return &IdentityError{version.File, fmt.Sprintf("format version %d", version.Found), fmt.Sprintf("at most %d", version.Max), "run the release that wrote it, or a later one; nothing was changed"}
	case errors.As(err, &tag):
		return &IdentityError{tag.File, fmt.Sprintf("a file of directory %x", tag.Found), fmt.Sprintf("one of directory %x", tag.Want), "move it back to where it came from; nothing was changed"}
	}
	return err
}

// The identity file says whose directory this is (docs/FORMAT.md, "Identity").
const (
	identityMagic   = "RAFI"
	identityVersion = 1
)

func (d *diskStorage) identityFile() string { return filepath.Join(d.dir, "identity") }

// firstIdentityFile is what the file is called until the log holds a record, so
// that a log which holds none beside a file identity is known to be lost.
func (d *diskStorage) firstIdentityFile() string { return filepath.Join(d.dir, "identity.new") }

// openIdentity reads the identity file, or makes one in an empty directory. It
// is written under another name, synced and renamed, so that it is whole.
func (d *diskStorage) openIdentity(id Identity) (dirID [16]byte, err error) {
	name := d.identityFile()
	found, err := d.readIdentity(name)
	if d.first = errors.Is(err, fs.ErrNotExist); d.first {
		name = d.firstIdentityFile()
		found, err = d.readIdentity(name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return d.makeIdentity(name, id)
	}
	switch {
	case err != nil:
		return dirID, err
	case found.Identity != id:
		return dirID, &IdentityError{name, found.String(), id.String(), "set Config.Dir to this node's own directory; nothing was changed"}
	case found.copied() && d.adopt:
		d.copied = true // see settleIdentity
	case found.copied():
		return dirID, &IdentityError{name, fmt.Sprintf("a copy (inode %d)", found.ownInode), fmt.Sprintf("the original (inode %d)", found.inode),
			"two nodes with one identity would vote twice: start the original, or, if it never will run again, set Config.AdoptDir for one start; nothing was changed"}
	}
	return found.directory, nil
}

// identityRead is what an identity file says, and which file it is.
type identityRead struct {
	Identity
	directory       [16]byte
	inode, ownInode uint64 // the one that it names, and its own; 0: not known
}

func (i *identityRead) copied() bool {
	return i.ownInode != i.inode && i.ownInode != 0 && i.inode != 0
}

// readIdentity reads an identity file. If there is none, the error matches
// fs.ErrNotExist.
func (d *diskStorage) readIdentity(name string) (found identityRead, err error) {
	f, err := d.fs.Open(name)
	if err != nil {
		return found, fmt.Errorf("raft: open %s: %w", name, err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return found, fmt.Errorf("raft: read %s: %w", name, err)
	}
	b := make([]byte, min(size, 4096))
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return found, fmt.Errorf("raft: read %s: %w", name, err)
	}
	if len(b) < 12 || string(b[:4]) != identityMagic {
		return found, &CorruptError{File: name, Found: fmt.Sprintf("%d bytes that do not begin with %s", size, identityMagic), Do: doRestore}
	}
	if v := binary.LittleEndian.Uint32(b[4:]); v != identityVersion {
		return found, &IdentityError{name, fmt.Sprintf("format version %d", v), fmt.Sprintf("%d", identityVersion), "run the release that wrote it, or a later one; nothing was changed"}
	}
	if crc32.Checksum(b[12:], castagnoli) != binary.LittleEndian.Uint32(b[8:]) {
		return found, &CorruptError{File: name, Offset: 8, Found: "a checksum that does not match", Do: doRestore}
	}
	r := reader{b: b[12:]}
	copy(found.directory[:], r.bytes(16))
	found.inode = r.uint64()
	found.Identity = Identity{r.string(), NodeID(r.string())}
	if err := r.finish(); err != nil {
		return found, &CorruptError{File: name, Offset: 12, Found: err.Error(), Do: doRestore}
	}
	info, err := d.fs.Stat(name)
	if err != nil {
		return found, fmt.Errorf("raft: %w", err)
	}
	found.ownInode = info.Inode
	return found, nil
}

func (d *diskStorage) makeIdentity(name string, id Identity) (dirID [16]byte, err error) {
	for _, dir := range []string{d.options.Dir, d.snapshots.dir} {
		if names, err := d.fs.List(dir); err == nil && len(names) > 0 {
			return dirID, &CorruptError{File: d.identityFile(), Found: "no identity file beside a log or a snapshot, as where a restore was cut short", Do: doEmpty}
		}
	}
	d.random(dirID[:])
	return dirID, d.writeIdentity(name, dirID, id)
}

// settleIdentity makes the identity file what it is to be, once the log was
// accepted and holds a record.
func (d *diskStorage) settleIdentity(dirID [16]byte, id Identity) error {
	name := d.identityFile()
	if d.first {
		name = d.firstIdentityFile()
	}
	if d.copied {
		if err := d.writeIdentity(name, dirID, id); err != nil {
			return err
		}
	}
	if !d.first {
		return nil
	}
	err := d.fs.Rename(name, d.identityFile())
	if err == nil {
		err = d.fs.SyncDir(d.dir)
	}
	if err != nil {
		return fmt.Errorf("raft: name %s: %w", d.identityFile(), err)
	}
	return nil
}

// writeIdentity writes the file under another name, syncs and renames it. It
// holds its own inode number, which stays through a rename and not in a copy.
func (d *diskStorage) writeIdentity(name string, dirID [16]byte, id Identity) error {
	tmp := name + ".tmp"
	if err := d.fs.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("raft: %w", err)
	}
	f, err := d.fs.Create(tmp)
	if err != nil {
		return fmt.Errorf("raft: make %s: %w", tmp, err)
	}
	info, err := d.fs.Stat(tmp)
	if err == nil {
		_, err = f.WriteAt(encodeIdentity(dirID, info.Inode, id), 0)
	}
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = d.fs.Rename(tmp, name)
	}
	if err == nil {
		err = d.fs.SyncDir(d.dir)
	}
	if err != nil {
		return fmt.Errorf("raft: write %s: %w", name, err)
	}
	return nil
}

func encodeIdentity(dirID [16]byte, inode uint64, id Identity) []byte {
	body := appendUint64s(slices.Clone(dirID[:]), inode)
	body = appendString(appendString(body, id.ClusterID), string(id.NodeID))
	b := binary.LittleEndian.AppendUint32([]byte(identityMagic), identityVersion)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(body, castagnoli))
	return append(b, body...)
}
