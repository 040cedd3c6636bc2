package raft

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"example.com/raft/internal/snap"
	"example.com/raft/internal/wal"
)

// This file looks into data directories whose nodes do not run, and changes
// nothing there.

// SnapshotReport is one snapshot of a data directory.
type SnapshotReport struct {
	File string    `json:"file"`
	Last EntryID   `json:"last"` // the last entry that it includes
	Time time.Time `json:"time"` // of that entry
	Size int64     `json:"size"` // of the state, in bytes
	// Problem is why it can't be used, empty if every byte was read and is right.
	Problem string `json:"problem,omitempty"`
}

// DirectoryReport is what Inspect finds in a data directory. It can be encoded
// as JSON, so that directories on several machines can be compared on one.
type DirectoryReport struct {
	Dir string `json:"dir"` // as Inspect was given it
	// Problem is why no node can run on it; what is below is then what could be
	// read. Err is the same as an error, and is not encoded.
	Problem string `json:"problem,omitempty"`
	Err     error  `json:"-"`
	InUse   bool   `json:"in_use,omitempty"` // because one runs on it already

	ID          NodeID `json:"id"`
	ClusterID   string `json:"cluster_id"`
	ClusterUUID string `json:"cluster_uuid"` // in hexadecimal; empty in one that has not formed or joined a cluster
	DirectoryID string `json:"directory_id"` // likewise
	Copied      bool   `json:"copied"`       // it is a copy: its node starts only with Config.AdoptDir
	Starts      uint64 `json:"starts"`       // of a node on it

	Term     Term      `json:"term"`
	VotedFor NodeID    `json:"voted_for,omitempty"` // in that term
	First    Index     `json:"first"`               // of the log; Last.Index+1 if it is empty
	Last     EntryID   `json:"last"`                // the newest entry, committed or not
	LastTime time.Time `json:"last_time"`           // that it was stamped with
	// Committed is the newest entry of which the directory proves that it was
	// committed. Later ones may have been: a node does not write down how far.
	Committed Index            `json:"committed"`
	Snapshots []SnapshotReport `json:"snapshots,omitempty"` // newest first

	Members     []MemberReport `json:"members,omitempty"` // by the newest configuration, committed or not
	ConfigIndex Index          `json:"config_index"`      // its entry
	Joint       bool           `json:"joint,omitempty"`   // it needs majorities of the voters as they are and as they will be

	History []HistoryRecord `json:"history,omitempty"`
}

// MemberReport is a member in a configuration.
type MemberReport struct {
	ID        NodeID `json:"id"`
	Addr      string `json:"addr"`
	Voter     bool   `json:"voter"`     // as it is
	WillVote  bool   `json:"will_vote"` // as it will be, when the change under way is done
	Directory string `json:"directory"` // in hexadecimal; zeros: not known yet
}

// Inspect reads a data directory whose node does not run: the log, every block
// of every snapshot, and who it belongs to. It changes nothing, but needs the
// permission to write for the lock. What is wrong is in the report: a
// *CorruptError for damage, an *InUseError for a running node, an
// *IdentityError for a newer format, an error that matches fs.ErrNotExist where
// there is no data directory, or ctx's.
func Inspect(ctx context.Context, dir string) DirectoryReport {
	conf := Config{Dir: dir}.withDefaults()
	return newDiskStorage(&conf).inspect(ctx)
}

func (d *diskStorage) inspect(ctx context.Context) DirectoryReport {
	r := DirectoryReport{Dir: d.dir}
	err := d.inspectLocked(ctx, &r)
	if err != nil {
		r.Err, r.Problem, r.InUse = err, err.Error(), errors.As(err, new(*InUseError))
	}
	return r
}

func (d *diskStorage) inspectLocked(ctx context.Context, r *DirectoryReport) error {
	if _, err := d.fs.Stat(d.identityFile()); err != nil {
		return fmt.Errorf("raft: %s is no data directory of a node, it has no file identity: %w", d.dir, err)
	}
	d.layOut()
	found, err := d.readIdentity(d.identityFile())
	if err != nil {
		return err
	}
	r.ID, r.ClusterID, r.Copied = found.NodeID, found.ClusterID, found.copied()
	r.DirectoryID = hex.EncodeToString(found.directory[:])
	// A directory without the lock's file is in nobody's use, and gets none.
	if _, err := d.fs.Stat(d.lockFile()); !errors.Is(err, fs.ErrNotExist) {
		if err := d.takeLock(); err != nil {
			return err
		}
		defer d.lock.Close()
	}
	var rec Recovered
	var l raftLog
	d.options.Tag, d.options.Begun = found.directory, true
	err = wal.Inspect(ctx, d.options, func(lsn wal.LSN, record wal.Record) error { return d.replay(&rec, &l, lsn, record) })
	if err != nil {
		return d.explain(err)
	}
	if err := d.replayed(&l); err != nil {
		return err
	}
	d.recovered(&rec, &l)
	rec.DirectoryID = found.directory
	damage, err := d.inspectSnapshots(ctx, r, &rec)
	if err != nil {
		return err
	}
	return errors.Join(r.describe(&rec), rec.unusable(d.dir, damage))
}

// inspectSnapshots reads every snapshot. It puts those that are whole into rec,
// and returns what is wrong with the newest of the others.
func (d *diskStorage) inspectSnapshots(ctx context.Context, r *DirectoryReport, rec *Recovered) (damage, err error) {
	t := &d.snapshots
	names, err := snap.List(d.fs, t.dir)
	if err != nil {
		return nil, fmt.Errorf("raft: %w", err)
	}
	slices.Reverse(names) // they begin with the index
	for _, name := range names {
		report := SnapshotReport{File: name}
		meta, size, err := t.verify(ctx, name)
		report.Last, report.Time, report.Size = meta.Last, meta.Time, size
		switch corrupt := (*CorruptError)(nil); {
		case err == nil:
			rec.Snapshots = append(rec.Snapshots, meta)
		case errors.As(err, &corrupt):
			report.Problem = err.Error()
			damage = cmp.Or(damage, err)
		default:
			return nil, err
		}
		r.Snapshots = append(r.Snapshots, report)
	}
	return damage, nil
}

// replacement returns the snapshot that has replaced the log without the log
// saying so yet: the node had stored it, and stopped. nil if there is none.
func (rec *Recovered) replacement() *SnapshotMeta {
	l := newRaftLog(rec.Start, rec.Last, rec.Runs, nil)
	if len(rec.Snapshots) > 0 && rec.Snapshots[0].Last.Index > rec.Start.Index && !l.matches(rec.Snapshots[0].Last) {
		return &rec.Snapshots[0]
	}
	return nil
}

// unusable returns why no node could start on a directory whose records are right.
func (rec *Recovered) unusable(dir string, damage error) error {
	if rec.Start.Index == 0 || len(rec.Snapshots) > 0 && rec.Snapshots[0].Last.Index >= rec.Start.Index {
		return nil
	}
	if damage != nil {
		return damage
	}
	return &CorruptError{File: dir, Found: fmt.Sprintf("a log that begins after entry %d, and no snapshot up to there", rec.Start.Index), Do: doRestore}
}

// describe fills in what a node would start with.
func (r *DirectoryReport) describe(rec *Recovered) error {
	l := newRaftLog(rec.Start, rec.Last, rec.Runs, rec.Tail)
	r.Term, r.Starts, r.History = rec.HardState.Term, rec.Boot, rec.History
	r.First, r.Last, r.Committed = rec.Start.Index+1, l.lastID(), rec.Start.Index
	data := rec.Config
	r.ConfigIndex = rec.ConfigIndex
	if n := len(rec.Tail); n > 0 {
		r.LastTime = lastTimeOf(rec.Tail[n-1])
	}
	if len(rec.Snapshots) > 0 {
		newest := &rec.Snapshots[0]
		r.Committed = max(r.Committed, newest.Last.Index)
		if newest.Last.Index >= rec.Last || rec.replacement() != nil {
			r.LastTime = newest.Time
		}
	}
	if m := rec.replacement(); m != nil {
		r.Term = max(r.Term, m.Last.Term)
		r.First, r.Last = m.Last.Index+1, m.Last
		data, r.ConfigIndex = m.Config, m.ConfigIndex
	}
	if data == nil {
		return nil
	}
	conf, err := decodeConfiguration(data)
	if err != nil {
		return &CorruptError{File: r.Dir, Found: fmt.Sprintf("entry %d, a configuration that can't be read (%v)", r.ConfigIndex, err), Do: doRestore}
	}
	r.ClusterUUID, r.Joint = hex.EncodeToString(conf.clusterUUID[:]), conf.joint
	for i := range conf.members {
		m := &conf.members[i]
		r.Members = append(r.Members, MemberReport{m.name, m.addr, m.votes(false), m.votes(true), hex.EncodeToString(m.dirID[:])})
		if uint64(m.id) == rec.HardState.VotedFor {
			r.VotedFor = m.name
		}
	}
	return nil
}

// String describes the directory to an operator, in a few lines.
func (r DirectoryReport) String() string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-9s "+format+"\n", append([]any{name}, args...)...)
	}
	fmt.Fprintf(&b, "%s\n", r.Dir)
	if r.Problem != "" {
		line("problem", "%s", r.Problem)
	}
	if r.ID == "" {
		return b.String()
	}
	uuid, starts := "none: it never was in one", fmt.Sprintf("started %d times", r.Starts)
	if r.Problem != "" && r.ClusterUUID == "" { // that was not read
		uuid, starts = "not known", "started an unknown number of times"
	}
	line("node", "%q of cluster %q, UUID %s", r.ID, r.ClusterID, cmp.Or(r.ClusterUUID, uuid))
	line("directory", "%s, %s", r.DirectoryID, starts)
	if r.Copied {
		line("", "a copy: its node starts only with AdoptDir")
	}
	if r.ClusterUUID != "" {
		line("term", "%d, voted for %s", r.Term, cmp.Or(string(r.VotedFor), "nobody"))
		entries := fmt.Sprintf("entries %d to", r.First)
		if r.First > r.Last.Index {
			entries = "none after entry"
		}
		line("log", "%s %v, of %s; up to %d it is known to be committed, and of what follows a directory does not say", entries, r.Last, r.LastTime.UTC().Format(time.RFC3339), r.Committed)
		for _, m := range r.Members {
			line("member", "%s", m)
		}
	}
	for _, s := range r.Snapshots {
		line("snapshot", "%s", s)
	}
	for _, h := range r.History {
		line("history", "%s", h)
	}
	return b.String()
}

func (s SnapshotReport) String() string {
	if s.Problem != "" {
		return s.File + ": " + s.Problem
	}
	return fmt.Sprintf("up to entry %v of %s, %d bytes", s.Last, s.Time.UTC().Format(time.RFC3339), s.Size)
}

func (m MemberReport) String() string {
	what := map[bool]string{true: "voter", false: "learner"}
	s := fmt.Sprintf("%s at %s, %s", m.ID, m.Addr, what[m.Voter])
	if m.WillVote != m.Voter {
		s += ", to be a " + what[m.WillVote]
	}
	return s
}
