package raft

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"time"

	"example.com/raft/internal/snap"
	"example.com/raft/internal/wal"
)

// A backup is a stored snapshot under another header, as a stream: whatever a
// snapshot holds is in it. It is restored into the data directory of a new
// cluster of one node. docs/OPERATING.md says how to use both.

// BackupInfo is what a backup says of itself.
type BackupInfo struct {
	ClusterID   string    `json:"cluster_id"`
	ClusterUUID string    `json:"cluster_uuid"` // in hexadecimal; of the one cluster that has this ClusterID and these founders
	Node        NodeID    `json:"node"`         // that wrote it
	Taken       time.Time `json:"taken"`        // when that began to write it, by its clock
	Term        Term      `json:"term"`         // that it had reached
	Last        EntryID   `json:"last"`         // the last entry that the state includes
	Time        time.Time `json:"time"`         // of that entry
	Members     []Member  `json:"members"`      // as of that entry
	Size        int64     `json:"size"`         // of the state, in bytes
}

// Backup writes a backup to w: the state, as of an entry at or after every one
// that was acknowledged, by any node, before the call. Any node takes one; it
// asks the leader first, and waits for one until ctx ends. Then it stores a
// snapshot, unless its newest one is as new, and copies that to w, in blocks
// with checksums. So a slow w holds up nothing, and needs the memory of a block.
//
// What w has got is a backup only if the error is nil; VerifyBackup refuses
// anything less. The error is ctx's, also with ErrNoLeader, then see
// BackupLocal; of TakeSnapshot; of w; a *CorruptError if the stored snapshot is
// damaged, then another one is taken and Backup may be called again; or matches
// ErrStopped. Close waits for a running Backup, which ends with the next block.
func (s *Server) Backup(ctx context.Context, w io.Writer) (BackupInfo, error) {
	if _, err := s.ReadIndex(ctx); err != nil {
		return BackupInfo{}, fmt.Errorf("raft: backup as of now needs a leader (BackupLocal does not): %w", err)
	}
	if err := s.TakeSnapshot(ctx); err != nil {
		return BackupInfo{}, err
	}
	return s.writeBackup(ctx, w)
}

// BackupLocal is Backup of what this node has, without asking a leader: for a
// node that reaches none. Entries that it has not applied are missing, though
// they may have been acknowledged. If the node can take no snapshot now, because
// its disk is full or its state machine has failed, its newest one is written.
// BackupInfo.Last says what is included.
func (s *Server) BackupLocal(ctx context.Context, w io.Writer) (BackupInfo, error) {
	err := s.TakeSnapshot(ctx)
	if err != nil && (ctx.Err() != nil || isClosed(s.cm.done)) {
		return BackupInfo{}, err
	}
	info, writeErr := s.writeBackup(ctx, w)
	if errors.Is(writeErr, errNothingToBackUp) {
		writeErr = cmp.Or(err, writeErr)
	}
	return info, writeErr
}

var errNothingToBackUp = errors.New("raft: there is nothing to back up: this node has applied nothing")

// writeBackup copies the newest snapshot to w.
func (s *Server) writeBackup(ctx context.Context, w io.Writer) (BackupInfo, error) {
	cm := s.cm
	cm.mu.Lock()
	alive, newest, term := cm.core.role != Dead, cm.core.newestSnapshot, cm.core.currentTerm
	if alive { // Close waits for the caller's goroutine as for those of the node
		cm.goroutines.add()
		cm.diskUsers.add()
		cm.writing.Add(1)
	}
	cm.unlock()
	if !alive {
		return BackupInfo{}, ErrStopped
	}
	defer func() {
		cm.writing.Add(-1)
		cm.leaveDisk()
		cm.goroutines.leave()
	}()
	if newest.Index == 0 {
		return BackupInfo{}, errNothingToBackUp
	}
	meta, r, err := s.openNewest(newest)
	if err != nil {
		return BackupInfo{}, err
	}
	defer r.Close()
	h := backupHeader{taken: time.Now(), term: term, cluster: s.conf.ClusterID, node: s.conf.ID, meta: meta}
	err = s.copyBackup(ctx, w, &h, r)
	return h.info(r.Size()), err
}

// openNewest opens the snapshot that ends at last, or the newest one if there
// are newer ones meanwhile.
func (s *Server) openNewest(last EntryID) (SnapshotMeta, SnapshotReader, error) {
	for {
		meta, r, err := s.storage.OpenSnapshot(last)
		if err == nil {
			return meta, r, nil
		}
		s.cm.mu.Lock()
		newest := s.cm.core.newestSnapshot
		s.cm.unlock()
		if !errors.Is(err, fs.ErrNotExist) || newest == last {
			return meta, nil, s.unreadable(last, err)
		}
		last = newest
	}
}

func (s *Server) copyBackup(ctx context.Context, w io.Writer, h *backupHeader, r SnapshotReader) error {
	var salt [8]byte
	rand.Read(salt[:])
	e, err := snap.NewEncoder(w, h.encode(), binary.LittleEndian.Uint64(salt[:]))
	buf := make([]byte, min(r.Size(), snapshotBlockBytes))
	for off := int64(0); off < r.Size() && err == nil; {
		if isClosed(s.cm.done) {
			return ErrStopped
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), r.Size()-off)]
		if n, err := r.ReadAt(p, off); n < len(p) {
			return s.unreadable(h.meta.Last, err)
		}
		_, err = e.Write(p)
		off += int64(len(p))
	}
	if err == nil {
		err = e.Finish()
	}
	if err != nil {
		return fmt.Errorf("raft: write a backup: %w; what was written is none", err)
	}
	return nil
}

// backupHeader is what a backup has in place of a snapshot's header
// (docs/FORMAT.md, "Backups").
type backupHeader struct {
	taken   time.Time
	term    Term
	cluster string
	node    NodeID
	meta    SnapshotMeta
}

const (
	backupMagic   = "raftbak\n"
	backupVersion = 1
	// No cluster gets there; beyond, numbers could not be raised any more.
	maxBackupIndex = 1 << 54
	maxBackupTerm  = 1 << 62
)

func (h *backupHeader) encode() []byte {
	b := append([]byte(backupMagic), backupVersion)
	b = appendUint64s(b, nanoseconds(h.taken), uint64(h.term))
	b = appendString(appendString(b, h.cluster), string(h.node))
	return h.meta.encode(b)
}

func (h *backupHeader) info(size int64) BackupInfo {
	conf, _ := decodeConfiguration(h.meta.Config) // it was decoded before
	return BackupInfo{
		ClusterID: h.cluster, ClusterUUID: hex.EncodeToString(conf.clusterUUID[:]), Node: h.node, Taken: h.taken, Term: h.term,
		Last: h.meta.Last, Time: h.meta.Time, Members: conf.list(), Size: size,
	}
}

// decodeBackupHeader reads a header whose checksum was right. name is for errors.
func decodeBackupHeader(b []byte, name string) (h backupHeader, err error) {
	rest, ok := bytes.CutPrefix(b, []byte(backupMagic))
	if !ok {
		return h, &RestoreError{RestoreNotBackup, name, "it is a snapshot file of a node's data directory, not what Backup writes; give the backup"}
	}
	r := reader{b: rest}
	if v := r.byte(); v != backupVersion && r.err == nil {
		return h, &RestoreError{RestoreNewer, name, fmt.Sprintf("it is a backup of version %d, and this program reads version %d; use the release that wrote it, or a later one", v, backupVersion)}
	}
	h.taken, h.term = time.Unix(0, int64(r.uint64())).UTC(), Term(r.uint64())
	h.cluster, h.node = r.string(), NodeID(r.string())
	if err = r.err; err == nil {
		h.meta, err = decodeSnapshotMeta(r.b)
	}
	if err == nil && (h.term < h.meta.Last.Term || h.term > maxBackupTerm || h.meta.Last.Index > maxBackupIndex) {
		err = fmt.Errorf("raft: term %d, with a last entry %v", h.term, h.meta.Last)
	}
	if err != nil {
		return h, &CorruptError{File: name, Found: fmt.Sprintf("a header that can't be read (%v)", err), Do: doOtherBackup}
	}
	return h, nil
}

const doOtherBackup = "it was cut short or damaged since it was written: copy it again from where it came, or use another one; nothing was changed"

// RestoreReason says why a backup was not restored.
type RestoreReason byte

const (
	// RestoreNotBackup: what was read is no backup.
	RestoreNotBackup RestoreReason = iota + 1
	// RestoreNewer: a newer release of this library wrote it.
	RestoreNewer
	// RestoreOtherCluster: it is of another cluster than RestoreOptions say.
	RestoreOtherCluster
	// RestoreNotEmpty: the directory holds something.
	RestoreNotEmpty
	// RestoreBadOptions: RestoreOptions lack something.
	RestoreBadOptions
)

func (r RestoreReason) String() string {
	switch r {
	case RestoreNotBackup:
		return "not a backup"
	case RestoreNewer:
		return "written by a newer release"
	case RestoreOtherCluster:
		return "of another cluster"
	case RestoreNotEmpty:
		return "the directory is not empty"
	case RestoreBadOptions:
		return "bad RestoreOptions"
	}
	return fmt.Sprintf("reason %d", byte(r))
}

// RestoreError is why a backup was not restored. Nothing was changed. A backup
// that is damaged or incomplete is a *CorruptError.
type RestoreError struct {
	Reason RestoreReason
	Path   string // the directory, or the backup's name if it has one
	Text   string // what was found, what to do
}

func (e *RestoreError) Error() string {
	return fmt.Sprintf("raft: can't restore: %s: %v: %s; nothing was changed", e.Path, e.Reason, e.Text)
}

// backupReader reads a backup in order: its state, after the header.
type backupReader struct {
	*snap.Decoder
	backupHeader
	name string
	size int64 // of the state read so far
}

// openBackup reads the header. If r has a Name, as an *os.File has, errors give it.
func openBackup(r io.Reader) (*backupReader, error) {
	b := &backupReader{name: "the backup"}
	if f, ok := r.(interface{ Name() string }); ok {
		b.name = f.Name()
	}
	start := make([]byte, len(snap.Magic))
	n, err := io.ReadFull(r, start)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("raft: read %s: %w", b.name, err)
	}
	if n == 0 || snap.Magic[:n] != string(start[:n]) {
		return nil, &RestoreError{RestoreNotBackup, b.name, fmt.Sprintf("it begins with %q; give what Backup has written, uncompressed and from its first byte on", start[:n])}
	}
	if b.Decoder, err = snap.NewDecoder(io.MultiReader(bytes.NewReader(start[:n]), r), b.name); err != nil {
		return nil, b.explain(err)
	}
	b.backupHeader, err = decodeBackupHeader(b.Header(), b.name)
	return b, err
}

func (b *backupReader) Read(p []byte) (int, error) {
	n, err := b.Decoder.Read(p)
	b.size += int64(n)
	return n, b.explain(err)
}

// explain turns the decoder's errors into this package's.
func (b *backupReader) explain(err error) error {
	var corrupt *snap.CorruptError
	var newer *snap.VersionError
	switch {
	case errors.As(err, &corrupt):
		return &CorruptError{File: b.name, Offset: corrupt.Offset, Found: corrupt.Found, Do: doOtherBackup}
	case errors.As(err, &newer):
		return &RestoreError{RestoreNewer, b.name, fmt.Sprintf("it has format version %d, and this program reads versions up to %d; use the release that wrote it, or a later one", newer.Found, newer.Max)}
	}
	return err
}

// VerifyBackup reads a backup to its end and checks every byte. It needs the
// memory of a block. The error is a *CorruptError for one that is damaged or
// incomplete, a *RestoreError for what is no backup, or r's.
func VerifyBackup(r io.Reader) (BackupInfo, error) {
	b, err := openBackup(r)
	if err != nil {
		return BackupInfo{}, err
	}
	if _, err = io.Copy(io.Discard, b); err != nil {
		return BackupInfo{}, err
	}
	return b.info(b.size), nil
}

// RestoreOptions say which cluster a backup becomes. All fields but FromCluster
// are required.
type RestoreOptions struct {
	ID        NodeID // of the node that will run on the directory, at first the only member
	Addr      string // host:port where others reach it
	ClusterID string // of the new cluster
	// FromCluster is the ClusterID of the cluster that the backup is of, if that
	// is another one than the new one's: so that no backup is restored by mistake.
	FromCluster string
}

func (o *RestoreOptions) validate() error {
	_, port, err := net.SplitHostPort(o.Addr)
	text := ""
	switch {
	case o.ID == "" || len(o.ID) > 255:
		text = fmt.Sprintf("ID: want 1 to 255 bytes, have %d", len(o.ID))
	case o.ClusterID == "" || len(o.ClusterID) > 255:
		text = fmt.Sprintf("ClusterID: want 1 to 255 bytes, have %d", len(o.ClusterID))
	case err != nil || port == "" || port == "0":
		text = fmt.Sprintf("Addr: want host:port, where the other nodes will reach this one, have %q", o.Addr)
	}
	if text != "" {
		return &RestoreError{RestoreBadOptions, "RestoreOptions", text}
	}
	return nil
}

// RestoreBackup makes dir, which must be empty or missing, the data directory
// of a new cluster with the state of a backup and one member, o.ID. Start with
// Config.Dir, ID and ClusterID as here runs it; Config.Bootstrap does not count.
// Other members begin with empty directories and AddVoter.
//
// The new cluster has a UUID of its own: nodes of the old one, and of others
// restored from the same backup, are refused by it and refuse it. Its indexes
// and terms begin far above those of the backup, so that a fencing token stays
// one, and nothing that a client remembers of the old cluster comes to mean
// something else.
//
// The backup is verified while it is read. After an error there is no data
// directory; after a crash Start refuses what is there, unless RestoreBackup
// had done its work. The error is ctx's, a *RestoreError, a *CorruptError, an
// *InUseError, r's or the disk's.
func RestoreBackup(ctx context.Context, dir string, r io.Reader, o RestoreOptions) (HistoryRecord, error) {
	conf := Config{Dir: dir}.withDefaults()
	return newDiskStorage(&conf).restoreBackup(ctx, r, &o, time.Now())
}

func (d *diskStorage) restoreBackup(ctx context.Context, r io.Reader, o *RestoreOptions, now time.Time) (HistoryRecord, error) {
	if err := o.validate(); err != nil {
		return HistoryRecord{}, err
	}
	b, err := openBackup(r)
	if err != nil {
		return HistoryRecord{}, err
	}
	if want := cmp.Or(o.FromCluster, o.ClusterID); b.cluster != want {
		return HistoryRecord{}, &RestoreError{RestoreOtherCluster, b.name, fmt.Sprintf(
			"it is of cluster %q, and one of %q is wanted; if it is the right one, set RestoreOptions.FromCluster to %q", b.cluster, want, b.cluster)}
	}
	if err := d.mustBeEmpty(); err != nil {
		return HistoryRecord{}, err
	}
	if err := d.fs.MkdirAll(d.dir); err != nil {
		return HistoryRecord{}, fmt.Errorf("raft: make data directory %s: %w", d.dir, err)
	}
	if err := d.takeLock(); err != nil {
		return HistoryRecord{}, err
	}
	defer d.lock.Close()
	if err := d.mustBeEmpty(); err != nil { // another one may have been at work
		return HistoryRecord{}, err
	}
	return d.restoreFrom(ctx, b, o, now)
}

// mustBeEmpty refuses a directory that holds more than a restore that failed
// may have left.
func (d *diskStorage) mustBeEmpty() error {
	names, err := d.fs.List(d.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, name := range names {
		if err != nil {
			break
		}
		var below []string
		if name == "snap" {
			if below, err = d.fs.List(filepath.Join(d.dir, name)); len(below) == 0 {
				continue
			}
		}
		if name != "lock" {
			return &RestoreError{RestoreNotEmpty, d.dir, fmt.Sprintf("it holds %s; name a directory that does not exist, or move what it holds away", filepath.Join(append([]string{name}, below...)[:min(2, 1+len(below))]...))}
		}
	}
	if err != nil {
		return fmt.Errorf("raft: list %s: %w", d.dir, err)
	}
	return nil
}

// restoreFrom writes a snapshot, a log that begins after it, and, last, the
// identity file, without which nothing of it counts.
func (d *diskStorage) restoreFrom(ctx context.Context, b *backupReader, o *RestoreOptions, now time.Time) (HistoryRecord, error) {
	var dirID [16]byte
	conf := configuration{}
	d.random(dirID[:])
	d.random(conf.clusterUUID[:])
	meta := b.meta // what else it says of the payload stays
	d.random(meta.ID[:])
	meta.Last = EntryID{Index(raised(uint64(b.meta.Last.Index), indexStep)), Term(raised(uint64(b.term), termStep))}
	conf.members = []member{{id: entryMemberID(meta.Last.Index, 0), name: o.ID, addr: o.Addr, dirID: dirID}}
	meta.ConfigIndex, meta.Config = meta.Last.Index, conf.encode()
	record := HistoryRecord{
		What: HistoryRestore, Time: now, Node: o.ID, From: b.info(0).ClusterUUID, To: hex.EncodeToString(conf.clusterUUID[:]),
		Kept: b.meta.Last, Next: meta.Last,
	}
	if b.cluster != o.ClusterID {
		record.Risks = []string{fmt.Sprintf("the backup is of cluster %q", b.cluster)}
	}
	w, err := d.CreateSnapshot(meta)
	if err != nil {
		return HistoryRecord{}, err
	}
	if _, err := io.Copy(w, &contextReader{ctx: ctx, r: b}); err != nil {
		return HistoryRecord{}, errors.Join(err, w.Abort())
	}
	if err := w.Commit(); err != nil {
		return HistoryRecord{}, errors.Join(err, w.Abort())
	}
	if err := d.beginLog(ctx, dirID, &meta, record); err != nil {
		return HistoryRecord{}, fmt.Errorf("raft: begin a log in %s: %w; empty the directory before it is tried again", d.dir, err)
	}
	if err := d.writeIdentity(d.identityFile(), dirID, Identity{o.ClusterID, o.ID}); err != nil {
		return HistoryRecord{}, err
	}
	return record, nil
}

// beginLog makes a log that begins after a snapshot.
func (d *diskStorage) beginLog(ctx context.Context, dirID [16]byte, meta *SnapshotMeta, record HistoryRecord) error {
	history, err := encodeHistory([]HistoryRecord{record})
	if err != nil {
		return err
	}
	d.first = true // the log is begun here
	if err := d.openLog(ctx, dirID, func(wal.LSN, wal.Record) error { return nil }); err != nil {
		return err
	}
	d.log.Append(wal.Record{Kind: recordHistory, Data: history})
	d.Append(Save{LSN: 1, HardState: &HardState{Term: meta.Last.Term}, Start: &meta.Last, Snapshot: meta})
	_, err = d.Flush()
	return errors.Join(err, d.log.Close())
}
