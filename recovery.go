package raft

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"example.com/raft/internal/wal"
)

// This file makes a cluster of the best directory that survives when the quorum
// is lost. docs/OPERATING.md has the procedure, docs/DESIGN.md the reasons.

// What an operator did to a data directory beside running a node on it.
const (
	HistoryRestore  = "restore"  // RestoreBackup made it
	HistoryRecovery = "recovery" // Recover made a cluster of it
)

// HistoryRecord says what an operator did to a data directory: restore a backup
// into it, or make a cluster of it when the quorum was lost. It is part of the
// directory, changes with it in one write, and is never removed. Server.Status
// and Inspect show it.
type HistoryRecord struct {
	What string    `json:"what"` // HistoryRestore or HistoryRecovery
	Time time.Time `json:"time"` // by the clock of the machine where it was done
	Node NodeID    `json:"node"`
	From string    `json:"from"` // UUID of the cluster whose state it was
	To   string    `json:"to"`   // UUID of the cluster that goes on with it
	Kept EntryID   `json:"kept"` // the last entry of the old cluster that the state includes
	Next EntryID   `json:"next"` // the entry after which, or as which, the new cluster begins

	Lost  []NodeID `json:"lost,omitempty"`  // the voters that were said to be lost for good
	Risks []string `json:"risks,omitempty"` // what was accepted, a sentence each
}

func (h HistoryRecord) String() string {
	what := "was restored from a backup"
	if h.What == HistoryRecovery {
		what = "was made a cluster of its own after the quorum was lost"
	}
	s := fmt.Sprintf("%s on %s: kept everything up to entry %v of cluster %s, goes on at %v as cluster %s",
		what, h.Time.UTC().Format(time.RFC3339), h.Kept, h.From, h.Next, h.To)
	if len(h.Lost) > 0 {
		s += "; lost: " + joinIDs(h.Lost)
	}
	if len(h.Risks) > 0 {
		s += "; " + strings.Join(h.Risks, "; ")
	}
	return s
}

// encodeHistory returns the data of a history record (docs/FORMAT.md, "History").
func encodeHistory(list []HistoryRecord) ([]byte, error) { return json.Marshal(list) }

func decodeHistory(b []byte) (list []HistoryRecord, err error) {
	err = json.Unmarshal(b, &list)
	return list, err
}

// The indexes and terms of a cluster that goes on with the state of another one
// are above those of the old one, also above what it may have reached after the
// backup or on nodes that are lost: a term stays a fencing token, and an index
// that a client remembers does not become another entry's. Round numbers show
// that they were raised.
const (
	termStep  = 1_000_000
	indexStep = 1_000_000_000_000
)

// raised returns a multiple of step that is more than step above x.
func raised(x, step uint64) uint64 { return (x/step + 2) * step }

// Survey is what the directories that survive of a cluster tell together.
type Survey struct {
	ClusterID   string
	ClusterUUID string            // in hexadecimal
	Directories []DirectoryReport // the usable ones, most up to date first (§5.4.1), then the others
	Usable      int               // how many are
	Voters      []NodeID          // by the configuration of the most up-to-date one
	Missing     []NodeID          // those of whom no usable directory is here
	// Quorum says that the usable directories are a majority: their nodes, once
	// they run, elect a leader and lose nothing.
	Quorum bool
	// MayBeLost says that the missing voters alone may have been a majority for
	// entries that no directory here has. If it is false, the most up-to-date
	// directory has everything that was ever acknowledged.
	MayBeLost bool
	// Committed is the newest entry of which some directory proves that it was
	// committed. The most up-to-date one has it.
	Committed Index
}

// SurveyDirectories compares the directories of one cluster. The error is a
// *RecoverError if they are of different clusters, if two are one node's, or if
// none is usable.
func SurveyDirectories(reports ...DirectoryReport) (Survey, error) {
	s := Survey{Directories: slices.Clone(reports)}
	usable := func(r *DirectoryReport) bool { return r.Problem == "" && r.ClusterUUID != "" }
	slices.SortStableFunc(s.Directories, func(a, b DirectoryReport) int {
		if usable(&a) != usable(&b) {
			return cmp.Compare(flag(usable(&b), 1), flag(usable(&a), 1))
		}
		return cmp.Or(cmp.Compare(b.Last.Term, a.Last.Term), cmp.Compare(b.Last.Index, a.Last.Index))
	})
	for i := range s.Directories {
		r := &s.Directories[i]
		if !usable(r) {
			break
		}
		s.Usable++
		first := &s.Directories[0]
		if r.ClusterUUID != first.ClusterUUID {
			return s, &RecoverError{Reason: RecoverOtherCluster, Dir: r.Dir, Text: fmt.Sprintf(
				"it is of cluster %s, and %s of cluster %s; give the directories of one cluster", r.ClusterUUID, first.Dir, first.ClusterUUID)}
		}
		for _, o := range s.Directories[:i] {
			if o.ID == r.ID {
				return s, &RecoverError{Reason: RecoverTwice, Dir: r.Dir, Text: fmt.Sprintf(
					"it is of node %q, and so is %s; give each directory once, and of two the one that was used last", r.ID, o.Dir)}
			}
		}
		s.Committed = max(s.Committed, r.Committed)
	}
	if s.Usable == 0 {
		return s, &RecoverError{Reason: RecoverNothing, Text: "none of the directories is usable; restore a backup as a new cluster, with RestoreBackup"}
	}
	s.judge()
	return s, nil
}

// String says to an operator what the directories tell together.
func (s Survey) String() string {
	if s.Usable == 0 {
		return "none of the directories is usable\n"
	}
	var b strings.Builder
	best := &s.Directories[0]
	fmt.Fprintf(&b, "cluster %q, UUID %s: voters %s\n", s.ClusterID, s.ClusterUUID, joinIDs(s.Voters))
	fmt.Fprintf(&b, "the most up-to-date directory is %s of %q: it ends with entry %v\n", best.Dir, best.ID, best.Last)
	if len(s.Missing) > 0 {
		fmt.Fprintf(&b, "voters without a usable directory here: %s\n", joinIDs(s.Missing))
	}
	switch {
	case s.Quorum:
		b.WriteString("the directories are those of a majority: start their nodes, and nothing is lost\n")
	case s.MayBeLost:
		fmt.Fprintf(&b, "entries after %v may have been acknowledged by voters that are not here\n", best.Last)
	default:
		b.WriteString("every entry that was acknowledged is in it\n")
	}
	return b.String()
}

// judge counts the voters by the configuration of the best directory.
func (s *Survey) judge() {
	best := &s.Directories[0]
	s.ClusterID, s.ClusterUUID = best.ClusterID, best.ClusterUUID
	s.Quorum = true
	for _, entered := range []bool{false, true}[:1+flag(best.Joint, 1)] {
		voters, missing := 0, 0
		for _, m := range best.Members {
			if entered && !m.WillVote || !entered && !m.Voter {
				continue
			}
			voters++
			if !slices.Contains(s.Voters, m.ID) {
				s.Voters = append(s.Voters, m.ID)
			}
			if !s.has(m) {
				missing++
				if !slices.Contains(s.Missing, m.ID) {
					s.Missing = append(s.Missing, m.ID)
				}
			}
		}
		s.Quorum = s.Quorum && voters-missing > voters/2
		s.MayBeLost = s.MayBeLost || missing > voters/2
	}
}

// has tells whether a usable directory is that of a member.
func (s *Survey) has(m MemberReport) bool {
	return slices.ContainsFunc(s.Directories[:s.Usable], func(r DirectoryReport) bool { return r.isOf(m) })
}

// isOf tells whether the directory is a member's. One with another ID under its
// name is that of a former member.
func (r *DirectoryReport) isOf(m MemberReport) bool {
	return r.ID == m.ID && (m.Directory == r.DirectoryID || strings.Trim(m.Directory, "0") == "")
}

// RecoverReason says why Recover refused.
type RecoverReason byte

const (
	// RecoverUnformed: the directory's node never was in a cluster.
	RecoverUnformed RecoverReason = iota + 1
	// RecoverNothing: no directory is usable.
	RecoverNothing
	// RecoverOtherCluster: the directories are of different clusters.
	RecoverOtherCluster
	// RecoverTwice: two directories are of one node.
	RecoverTwice
	// RecoverBetter: another directory is more up to date. RecoverOptions.LoseEntries overrides.
	RecoverBetter
	// RecoverQuorum: enough directories are there to go on without. RecoverOptions.AbandonQuorum overrides.
	RecoverQuorum
	// RecoverUnaccounted: a voter is neither among the directories nor said to be
	// lost, or is said to be lost and is not.
	RecoverUnaccounted
	// RecoverNotMember: the node was removed, or not added yet. RecoverOptions.NotMember overrides.
	RecoverNotMember
	// RecoverCopy: the directory is a copy. RecoverOptions.AdoptCopy overrides.
	RecoverCopy
	// RecoverBadAddr: the address is not of the form host:port.
	RecoverBadAddr
	// RecoverChanged: the directory has changed since it was looked at.
	RecoverChanged
)

func (r RecoverReason) String() string {
	switch r {
	case RecoverUnformed:
		return "not of a cluster"
	case RecoverNothing:
		return "nothing to recover"
	case RecoverOtherCluster:
		return "different clusters"
	case RecoverTwice:
		return "one node twice"
	case RecoverBetter:
		return "another directory is more up to date"
	case RecoverQuorum:
		return "no recovery is needed"
	case RecoverUnaccounted:
		return "not all voters are accounted for"
	case RecoverNotMember:
		return "not a member"
	case RecoverCopy:
		return "a copy"
	case RecoverBadAddr:
		return "bad address"
	case RecoverChanged:
		return "changed meanwhile"
	}
	return fmt.Sprintf("reason %d", byte(r))
}

// RecoverError is why Recover refused. Nothing was changed.
type RecoverError struct {
	Reason RecoverReason
	Dir    string // may be empty
	Text   string // what was found, what to do
}

func (e *RecoverError) Error() string {
	s := "raft: can't recover"
	if e.Dir != "" {
		s += " " + e.Dir
	}
	return fmt.Sprintf("%s: %v: %s; nothing was changed", s, e.Reason, e.Text)
}

// RecoverOptions say what is known of the other nodes, and which risks are taken.
type RecoverOptions struct {
	// Lost names the voters whose data is gone for good. With those that have a
	// directory here they must be all voters.
	Lost []NodeID
	// Others are the reports of the other directories that survive, so that the
	// best one is chosen.
	Others []DirectoryReport
	Addr   string // host:port where others will reach the node; default: as before
	DryRun bool   // only say what would be done

	// Each of these takes a risk that Recover would refuse.
	LoseEntries   bool // one of Others is more up to date: what only that one has is lost, though it may have been acknowledged
	AbandonQuorum bool // enough directories survive for a quorum: if their nodes start again they are a second cluster
	NotMember     bool // the node was removed, or not added yet: its log may lack what was acknowledged since
	AdoptCopy     bool // the directory is a copy: if the original is ever used again there are two clusters that look like one
}

// RecoveryPlan is what Recover does, or with DryRun would do. String says it to
// an operator.
type RecoveryPlan struct {
	Directory DirectoryReport // that goes on
	Survey    Survey          // of that one and the others
	Member    Member          // the only one of the new cluster
	Record    HistoryRecord   // what is noted; To is empty until it is done
}

// String says to an operator what is done, what may be lost, and what comes next.
func (p RecoveryPlan) String() string {
	var b strings.Builder
	b.WriteString(p.Survey.String())
	fmt.Fprintf(&b, "%s goes on as a new cluster with one member, %q at %s, from entry %v\n", p.Directory.Dir, p.Member.ID, p.Member.Addr, p.Record.Next)
	for _, risk := range p.Record.Risks {
		fmt.Fprintf(&b, "risk: %s\n", risk)
	}
	if len(p.Record.Lost) > 0 {
		fmt.Fprintf(&b, "lost, never to be started again: %s\n", joinIDs(p.Record.Lost))
	}
	if p.Record.To == "" {
		b.WriteString("nothing was changed yet\n")
		return b.String()
	}
	fmt.Fprintf(&b, "done: it is cluster %s; start its node, empty the directories of the others, and add them with AddVoter\n", p.Record.To)
	return b.String()
}

// Recover makes a cluster of one member of a directory that survives, when the
// quorum of its cluster is lost for good. The state is that of the directory's
// whole log: entries that were not known to be committed are from now on, and
// entries that only lost nodes had are lost. The plan says which; with
// RecoverOptions.DryRun it is all that happens.
//
// Start then runs the node. Others begin with empty directories and AddVoter;
// those of the old cluster that survive too must be emptied first. The new
// cluster has a UUID of its own, so that old nodes that come back are refused,
// and its terms begin far above the old ones, so that they stay fencing tokens.
// Indexes go on where the log ends.
//
// No node may run on the directory. The change is one write of the log: after a
// crash the directory is as before or recovered. One that was a copy may then be
// one still: start it once with Config.AdoptDir. The error is a *RecoverError,
// what Inspect finds, ctx's, or the disk's; after one of the disk Inspect says
// whether it was done.
func Recover(ctx context.Context, dir string, o RecoverOptions) (RecoveryPlan, error) {
	conf := Config{Dir: dir, AdoptDir: o.AdoptCopy}.withDefaults()
	return recoverDirectory(ctx, func() *diskStorage { return newDiskStorage(&conf) }, &o, time.Now())
}

func recoverDirectory(ctx context.Context, storage func() *diskStorage, o *RecoverOptions, now time.Time) (RecoveryPlan, error) {
	plan, err := planRecovery(storage().inspect(ctx), o)
	if err != nil || o.DryRun {
		return plan, err
	}
	plan.Record.Time = now
	return plan, storage().recoverAlone(ctx, &plan)
}

// planRecovery decides whether a directory may go on alone.
func planRecovery(r DirectoryReport, o *RecoverOptions) (p RecoveryPlan, err error) {
	p.Directory = r
	refuse := func(reason RecoverReason, format string, args ...any) (RecoveryPlan, error) {
		return p, &RecoverError{Reason: reason, Dir: r.Dir, Text: fmt.Sprintf(format, args...)}
	}
	if r.Err != nil {
		return p, r.Err
	}
	for _, other := range o.Others {
		if other.InUse {
			return p, &InUseError{other.Dir, cmp.Or(other.Err, fmt.Errorf("the node is %q", other.ID))}
		}
	}
	if r.ClusterUUID == "" {
		return refuse(RecoverUnformed, "its node never formed or joined a cluster; there is nothing in it")
	}
	if p.Survey, err = SurveyDirectories(append([]DirectoryReport{r}, o.Others...)...); err != nil {
		return p, err
	}
	best := &p.Survey.Directories[0]
	better := best.Last.Term > r.Last.Term || best.Last.Term == r.Last.Term && best.Last.Index > r.Last.Index
	if better && !o.LoseEntries {
		return refuse(RecoverBetter, "its log ends with entry %v, and that of node %q (%s) with %v; recover that one, or set LoseEntries to lose what only it has", r.Last, best.ID, best.Dir, best.Last)
	}
	if p.Survey.Quorum && !o.AbandonQuorum && len(p.Survey.Voters) == 1 && p.Survey.Voters[0] == r.ID {
		start := "start it"
		if r.Copied {
			start = "start it once with AdoptDir, because the directory is a copy"
		}
		return refuse(RecoverQuorum, "its node %q is the only voter, as after a recovery or a restore: %s, and nothing is lost; or set AbandonQuorum", r.ID, start)
	}
	if p.Survey.Quorum && !o.AbandonQuorum {
		return refuse(RecoverQuorum, "the directories that are here (%s) are a majority of the voters (%s): start their nodes, and nothing is lost; or set AbandonQuorum and empty the other directories",
			joinIDs(p.Survey.present()), joinIDs(p.Survey.Voters))
	}
	if err := p.Survey.account(r.Dir, o.Lost); err != nil {
		return p, err
	}
	i := slices.IndexFunc(best.Members, r.isOf)
	if i < 0 && !o.NotMember {
		return refuse(RecoverNotMember, "its node %q is not among the members %s: it was removed, or not added yet, and may lack what was acknowledged since; recover another directory, or set NotMember", r.ID, describeReports(best.Members))
	}
	if r.Copied && !o.AdoptCopy {
		return refuse(RecoverCopy, "it was copied from where its node ran; if that directory will never be used again, set AdoptCopy")
	}
	p.Member = Member{ID: r.ID, Addr: o.Addr}
	if i >= 0 {
		p.Member.Addr = cmp.Or(o.Addr, best.Members[i].Addr)
	}
	if checkMembers([]Member{p.Member}) != nil {
		return refuse(RecoverBadAddr, "its node would be reached at %q; set Addr to host:port", p.Member.Addr)
	}
	p.record(o, better, i < 0)
	return p, nil
}

// present returns the nodes of the usable directories.
func (s *Survey) present() (ids []NodeID) {
	for i := range s.Directories[:s.Usable] {
		ids = append(ids, s.Directories[i].ID)
	}
	return ids
}

// account checks that every voter is here or said to be lost.
func (s *Survey) account(dir string, lost []NodeID) error {
	refuse := func(format string, args ...any) error {
		return &RecoverError{Reason: RecoverUnaccounted, Dir: dir, Text: fmt.Sprintf(format, args...)}
	}
	for _, id := range lost {
		switch {
		case !slices.ContainsFunc(s.Directories[0].Members, func(m MemberReport) bool { return m.ID == id }):
			return refuse("%q is named as lost and is no member; the members are %s", id, describeReports(s.Directories[0].Members))
		case !slices.Contains(s.Missing, id) && slices.Contains(s.Voters, id):
			return refuse("%q is named as lost, and its directory is here", id)
		}
	}
	for _, id := range s.Missing {
		if slices.Contains(lost, id) {
			continue
		}
		for i := range s.Directories[s.Usable:] {
			if r := &s.Directories[s.Usable+i]; r.ID == id {
				return refuse("the directory %s of voter %q can't be used (%s); if its data is gone for good, name it in Lost", r.Dir, id, r.Problem)
			}
		}
		return refuse("%q is a voter: give the report of its directory in Others, or, if its data is gone for good, name it in Lost", id)
	}
	return nil
}

// record writes down what is done and what is risked by it.
func (p *RecoveryPlan) record(o *RecoverOptions, worse, stranger bool) {
	r, s := &p.Directory, &p.Survey
	term := r.Term
	for i := range s.Directories {
		term = max(term, s.Directories[i].Term)
	}
	p.Record = HistoryRecord{
		What: HistoryRecovery, Node: r.ID, From: r.ClusterUUID, Kept: r.Last, Lost: o.Lost,
		Next: EntryID{r.Last.Index + 1, Term(raised(uint64(term), termStep))},
	}
	risk := func(format string, args ...any) {
		p.Record.Risks = append(p.Record.Risks, fmt.Sprintf(format, args...))
	}
	if s.MayBeLost {
		risk("entries after %v may have been acknowledged, and are lost", r.Last)
	}
	if worse {
		risk("entries up to %v, which node %q has (%s), are given up", s.Directories[0].Last, s.Directories[0].ID, s.Directories[0].Dir)
	}
	if known := min(s.Committed, r.Last.Index); known < r.Last.Index {
		risk("entries %d to %d are kept, and count as committed from now on; whether they were, the directories do not say, because a node does not write down how far its log is committed: this is no sign that anything is lost; of those that were not, a command takes effect though its proposer may have been told that it did not",
			known+1, r.Last.Index)
	}
	if s.Quorum {
		risk("a quorum survives: if its other nodes start again, they are a second cluster")
	}
	if stranger {
		risk("the node was no member, and may lack what was acknowledged")
	}
	if r.Copied {
		risk("the directory is a copy: if the original is used again, there are two clusters")
	}
}

func describeReports(list []MemberReport) string {
	var ids []NodeID
	for _, m := range list {
		ids = append(ids, m.ID)
	}
	return cmp.Or(joinIDs(ids), "nobody")
}

// recoverAlone appends the configuration of a cluster of one. Everything is in
// one batch of the log. Only then is a copy taken over: until it is, Start
// refuses it, so nobody votes with it in the old cluster.
func (d *diskStorage) recoverAlone(ctx context.Context, p *RecoveryPlan) error {
	id := Identity{p.Directory.ClusterID, p.Directory.ID}
	rec, err := d.open(ctx, id)
	if err != nil {
		return err
	}
	if err = d.appendRecovery(&rec, p); err == nil {
		err = d.settleIdentity(rec.DirectoryID, id)
	}
	return errors.Join(err, d.Close())
}

func (d *diskStorage) appendRecovery(rec *Recovered, p *RecoveryPlan) error {
	var saves []Save
	l := newRaftLog(rec.Start, rec.Last, rec.Runs, rec.Tail)
	if i := slices.IndexFunc(rec.Snapshots, func(m SnapshotMeta) bool { return m.Last == p.Record.Kept }); l.lastID() != p.Record.Kept && i >= 0 {
		meta := &rec.Snapshots[i] // it has replaced the log, which is told now
		saves = append(saves, Save{LSN: 1, Start: &meta.Last, Snapshot: meta})
		l.replace(meta.Last)
	}
	if l.lastID() != p.Record.Kept || rec.Boot != p.Directory.Starts+1 || hex.EncodeToString(rec.DirectoryID[:]) != p.Directory.DirectoryID {
		return &RecoverError{Reason: RecoverChanged, Dir: d.dir, Text: "a node has run on it since it was looked at; stop that node, and begin again"}
	}
	conf := configuration{members: []member{{id: entryMemberID(p.Record.Next.Index, 0), name: p.Member.ID, addr: p.Member.Addr, dirID: rec.DirectoryID}}}
	d.random(conf.clusterUUID[:])
	p.Record.To = hex.EncodeToString(conf.clusterUUID[:])
	history, err := encodeHistory(append(slices.Clip(rec.History), p.Record))
	if err != nil {
		return err
	}
	at := p.Record.Time
	if p.Directory.LastTime.After(at) {
		at = p.Directory.LastTime // times never decrease along a log
	}
	hard := rec.HardState
	hard.Term, hard.VotedFor = p.Record.Next.Term, 0
	entry := makeEntry(entryConfiguration, p.Record.Next, at, conf.encode())
	saves = append(saves, Save{LSN: LSN(len(saves) + 1), HardState: &hard, Entries: []Entries{entry}})
	d.log.Append(wal.Record{Kind: recordHistory, Data: history})
	for _, s := range saves {
		d.Append(s)
	}
	if _, err := d.Flush(); err != nil {
		return fmt.Errorf("raft: recover %s: %w; look with Inspect whether it was done", d.dir, err)
	}
	return nil
}
