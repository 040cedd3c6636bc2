package raft

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
)

// reportOf is the report of a usable directory.
func reportOf(id NodeID, last EntryID, members string) DirectoryReport {
	r := DirectoryReport{Dir: "/" + string(id), ID: id, ClusterID: "c", ClusterUUID: "u", DirectoryID: string(id) + id1, Last: last, Term: last.Term, Committed: 3}
	r.Members = membersOf(members)
	return r
}

const id1 = "1" // makes a name a directory's

// membersOf reads "a b -c +d e-": voters a, b and e, a learner c, d that is to
// become a voter and e that is to leave.
func membersOf(s string) (list []MemberReport) {
	for _, f := range strings.Fields(s) {
		m := MemberReport{ID: NodeID(strings.Trim(f, "-+")), Voter: true, WillVote: true}
		m.Addr, m.Directory = string(m.ID)+":1", string(m.ID)+id1
		switch {
		case f[0] == '-':
			m.Voter, m.WillVote = false, false
		case f[0] == '+':
			m.Voter, m.Directory = false, strings.Repeat("0", 32)
		case strings.HasSuffix(f, "-"):
			m.WillVote = false
		}
		list = append(list, m)
	}
	return list
}

// Quorum and MayBeLost are what the definition of a majority says, for all
// configurations of up to four members and all subsets of directories.
func TestSurveyCounts(t *testing.T) {
	kinds := []string{"%s", "-%s", "+%s", "%s-"}
	tried := 0
	for n := 1; n <= 4; n++ {
		for code := range 1 << (2 * n) {
			var members []string
			for i := range n {
				members = append(members, fmt.Sprintf(kinds[code>>(2*i)&3], string(rune('a'+i))))
			}
			list := membersOf(strings.Join(members, " "))
			for _, joint := range []bool{false, true} {
				voters := func(entered bool) (ids []NodeID) {
					for _, m := range list {
						if m.Voter && !entered || m.WillVote && entered {
							ids = append(ids, m.ID)
						}
					}
					return ids
				}
				sets := [][]NodeID{voters(false)}
				if joint {
					sets = append(sets, voters(true))
				}
				if len(sets[0]) == 0 || len(sets[len(sets)-1]) == 0 {
					continue
				}
				for here := 1; here < 1<<n; here++ {
					var reports []DirectoryReport
					for i := range n {
						if here>>i&1 == 1 {
							r := reportOf(list[i].ID, EntryID{9, 2}, "")
							r.Members, r.Joint = list, joint
							reports = append(reports, r)
						}
					}
					s, err := SurveyDirectories(reports...)
					if err != nil {
						t.Fatal(err)
					}
					tried++
					quorum, lost := true, false
					for _, set := range sets {
						present := 0
						for _, id := range set {
							if slices.ContainsFunc(reports, func(r DirectoryReport) bool { return r.ID == id }) {
								present++
							}
						}
						quorum = quorum && 2*present > len(set)
						lost = lost || 2*(len(set)-present) > len(set)
					}
					if s.Quorum != quorum || s.MayBeLost != lost {
						t.Fatalf("%v, joint %v, directories %b: %+v, want quorum %v, lost %v", members, joint, here, s, quorum, lost)
					}
				}
			}
		}
	}
	if tried < 1000 {
		t.Errorf("only %d cases", tried)
	}
}

// The best directory is the one that would win an election (§5.4.1); what does
// not count is last.
func TestSurveyOrder(t *testing.T) {
	broken := DirectoryReport{Dir: "/x", ID: "x", Problem: "broken"}
	unformed := DirectoryReport{Dir: "/y", ID: "y"}
	reports := []DirectoryReport{broken, reportOf("a", EntryID{9, 2}, "a b c d e"), unformed, reportOf("b", EntryID{7, 3}, "a b c d e"), reportOf("c", EntryID{8, 3}, "a b c d e")}
	s, err := SurveyDirectories(reports...)
	if err != nil || s.Usable != 3 || s.Directories[0].ID != "c" || s.Directories[1].ID != "b" || s.Directories[2].ID != "a" || joinIDs(s.Missing) != "d, e" || !s.Quorum {
		t.Errorf("%+v, %v", s, err)
	}
	// A directory that its member has not had since it was added again is nobody's.
	old := reportOf("b", EntryID{9, 9}, "a b c")
	old.DirectoryID = "b0"
	if s, err = SurveyDirectories(reportOf("a", EntryID{9, 9}, "a b c"), old); err != nil || s.Quorum || joinIDs(s.Missing) != "b, c" {
		t.Errorf("%+v, %v", s, err)
	}
}

// Recover refuses what is unsafe, by type, and says what to do; each override
// overrides its own reason only.
func TestRecoverRefuses(t *testing.T) {
	const abc = "a b c"
	a := reportOf("a", EntryID{9, 2}, abc)
	with := func(f func(r *DirectoryReport)) DirectoryReport {
		r := a
		f(&r)
		return r
	}
	lost := []NodeID{"b", "c"}
	for _, c := range []struct {
		what   string
		r      DirectoryReport
		o      RecoverOptions
		reason RecoverReason // 0: not refused
		text   string
	}{
		{"all is well", a, RecoverOptions{Lost: lost}, 0, ""},
		{"unformed", with(func(r *DirectoryReport) { r.ClusterUUID = "" }), RecoverOptions{Lost: lost}, RecoverUnformed, "never"},
		{"one is forgotten", a, RecoverOptions{Lost: lost[:1]}, RecoverUnaccounted, `"c" is a voter`},
		{"a stranger is lost", a, RecoverOptions{Lost: []NodeID{"b", "c", "d"}}, RecoverUnaccounted, `"d" is named as lost and is no member`},
		{"one that is here is lost", a, RecoverOptions{Lost: []NodeID{"a", "b", "c"}}, RecoverUnaccounted, `"a" is named as lost, and its directory is here`},
		{"one is damaged", a, RecoverOptions{Lost: lost[:1], Others: []DirectoryReport{{Dir: "/c", ID: "c", Problem: "it rotted"}}}, RecoverUnaccounted, "it rotted"},
		{"one is damaged and given up", a, RecoverOptions{Lost: lost, Others: []DirectoryReport{{Dir: "/c", ID: "c", Problem: "it rotted"}}}, 0, ""},
		{"a quorum is here", a, RecoverOptions{Lost: lost[:1], Others: []DirectoryReport{reportOf("c", EntryID{9, 2}, abc)}}, RecoverQuorum, "start their nodes"},
		{"a quorum is abandoned", a, RecoverOptions{Lost: lost[:1], Others: []DirectoryReport{reportOf("c", EntryID{9, 2}, abc)}, AbandonQuorum: true}, 0, "second cluster"},
		{"alone already", with(func(r *DirectoryReport) { r.Members = membersOf("a") }), RecoverOptions{}, RecoverQuorum, `"a" is the only voter`},
		{"a longer log", reportOf("a", EntryID{9, 2}, "a b c d e"), RecoverOptions{Lost: []NodeID{"c", "d", "e"}, Others: []DirectoryReport{reportOf("b", EntryID{10, 2}, "a b c d e")}}, RecoverBetter, "/b"},
		{"a later term", reportOf("a", EntryID{9, 2}, "a b c d e"), RecoverOptions{Lost: []NodeID{"c", "d", "e"}, Others: []DirectoryReport{reportOf("b", EntryID{5, 3}, "a b c d e")}}, RecoverBetter, "/b"},
		{"a longer log is given up", reportOf("a", EntryID{9, 2}, "a b c d e"), RecoverOptions{Lost: []NodeID{"c", "d", "e"}, Others: []DirectoryReport{reportOf("b", EntryID{10, 2}, "a b c d e")}, LoseEntries: true}, 0, "given up"},
		{"an equal log", reportOf("a", EntryID{9, 2}, "a b c d e"), RecoverOptions{Lost: []NodeID{"c", "d", "e"}, Others: []DirectoryReport{reportOf("b", EntryID{9, 2}, "a b c d e")}}, 0, ""},
		{"another cluster's", a, RecoverOptions{Lost: lost, Others: []DirectoryReport{func() DirectoryReport { r := reportOf("b", EntryID{1, 1}, abc); r.ClusterUUID = "v"; return r }()}}, RecoverOtherCluster, "of one cluster"},
		{"a node twice", a, RecoverOptions{Lost: lost, Others: []DirectoryReport{with(func(r *DirectoryReport) { r.Dir = "/a2" })}}, RecoverTwice, "used last"},
		{"no member", with(func(r *DirectoryReport) { r.Members = membersOf("b c") }), RecoverOptions{Lost: lost, Addr: "a:1"}, RecoverNotMember, "was removed"},
		{"no member all the same", with(func(r *DirectoryReport) { r.Members = membersOf("b c") }), RecoverOptions{Lost: lost, Addr: "a:1", NotMember: true}, 0, "no member"},
		{"a learner", with(func(r *DirectoryReport) { r.Members = membersOf("-a b c") }), RecoverOptions{Lost: lost}, 0, ""},
		{"a copy", with(func(r *DirectoryReport) { r.Copied = true }), RecoverOptions{Lost: lost}, RecoverCopy, "AdoptCopy"},
		{"a copy all the same", with(func(r *DirectoryReport) { r.Copied = true }), RecoverOptions{Lost: lost, AdoptCopy: true}, 0, "two clusters"},
		{"a bad address", a, RecoverOptions{Lost: lost, Addr: "nowhere"}, RecoverBadAddr, "host:port"},
		{"no address", with(func(r *DirectoryReport) { r.Members = membersOf("b c") }), RecoverOptions{Lost: lost, NotMember: true}, RecoverBadAddr, "host:port"},
	} {
		plan, err := planRecovery(c.r, &c.o)
		var refused *RecoverError
		switch {
		case c.reason == 0 && (err != nil || !strings.Contains(plan.String(), c.text)):
			t.Errorf("%s: %v\n%v", c.what, err, plan)
		case c.reason != 0 && (!errors.As(err, &refused) || refused.Reason != c.reason || !strings.Contains(err.Error(), c.text)):
			t.Errorf("%s: %v", c.what, err)
		}
	}
	if _, err := SurveyDirectories(DirectoryReport{Dir: "/x", Problem: "gone"}); !errors.As(err, new(*RecoverError)) {
		t.Errorf("a survey of nothing: %v", err)
	}
	for reason := RecoverUnformed; reason <= RecoverChanged; reason++ {
		if strings.HasPrefix(reason.String(), "reason") {
			t.Errorf("reason %d has no text", reason)
		}
	}
}

// The plan says the truth about what may be lost: with two of four voters gone
// there is no quorum, and yet nothing that was acknowledged is missing.
func TestRecoverSaysWhatIsLost(t *testing.T) {
	a, b := reportOf("a", EntryID{9, 2}, "a b c d"), reportOf("b", EntryID{8, 2}, "a b c d")
	b.Committed, b.Term = 6, 3*termStep+5 // it voted in a term that came to nothing
	plan, err := planRecovery(a, &RecoverOptions{Lost: []NodeID{"c", "d"}, Others: []DirectoryReport{b}})
	if err != nil || plan.Survey.MayBeLost || len(plan.Record.Risks) != 1 || !strings.Contains(plan.String(), "every entry that was acknowledged is in it") || !strings.Contains(plan.String(), "entries 7 to 9 are kept, and count as committed from now on; whether they were, the directories do not say") {
		t.Errorf("%v, %v", plan, err)
	}
	if plan.Record.Next != (EntryID{10, 5 * termStep}) || plan.Record.Kept != a.Last {
		t.Errorf("%+v", plan.Record)
	}
	plan, err = planRecovery(a, &RecoverOptions{Lost: []NodeID{"b", "c", "d"}})
	if err != nil || !plan.Survey.MayBeLost || !strings.Contains(plan.String(), "entries after 9 (term 2) may have been acknowledged") {
		t.Errorf("%v, %v", plan, err)
	}
	a.Committed = 9
	if plan, err = planRecovery(a, &RecoverOptions{Lost: []NodeID{"b", "c", "d"}}); err != nil || strings.Contains(plan.String(), "count as committed") {
		t.Errorf("%v, %v", plan, err)
	}
}

// Two of three disks are lost under load. The third directory is looked at, made
// a cluster of its own and grown again. Whatever was acknowledged up to where its
// log ends is there, and nothing else is said to be lost; the old nodes are
// refused when they come back.
func TestRecoverUnderLoad(t *testing.T) {
	before, after := t.TempDir(), t.TempDir()
	machines := WithStateMachine(func() StateMachine { return &journal{} })
	synctest.Test(t, func(t *testing.T) {
		acknowledged := map[Index]string{}
		h := NewHarness(t, 3, WithDisk(before), machines)
		leader, _ := h.CheckSingleLeader()
		if leader == 0 {
			h.Transfer(1)
		}
		write := func(what string, n int) {
			for i := range n {
				cmd := fmt.Sprintf("%s%d", what, i)
				r, err := h.Server(1).Propose(t.Context(), []byte(cmd))
				if err != nil {
					t.Fatal(err)
				}
				acknowledged[r.Index] = cmd
			}
		}
		write("a", 30)
		h.TakeSnapshot(0)
		write("b", 20)
		h.DisconnectPeer(0)
		write("lost", 10)
		h.Shutdown()

		survivor, dead := filepath.Join(after, "0"), filepath.Join(after, "1")
		for i, dir := range []string{survivor, dead} {
			if err := os.Rename(filepath.Join(before, fmt.Sprint(i)), dir); err != nil {
				t.Fatal(err)
			}
		}
		plan := recoverSurvivor(t, survivor, dead)

		g := NewHarness(t, 1, WithDisk(after), machines)
		defer g.Shutdown()
		g.CheckSingleLeader()
		if _, err := g.Server(0).ReadIndex(t.Context()); err != nil {
			t.Fatal(err)
		}
		got := " " + readJournal(g, 0) + " "
		lost := 0
		for i, cmd := range acknowledged {
			if there := strings.Contains(got, " "+cmd+" "); there != (i <= plan.Record.Kept.Index) {
				t.Fatalf("entry %d, %s: there is %v; the log was kept up to %v", i, cmd, there, plan.Record.Kept)
			} else if !there {
				lost++
			}
		}
		if lost == 0 {
			t.Fatal("nothing was lost: the test does not test that it is said")
		}
		goOn(t, g, plan)
	})
}

// recoverSurvivor looks at two directories of a cluster of three, of which one
// is said to be lost, and recovers the other.
func recoverSurvivor(t *testing.T, survivor, dead string) RecoveryPlan {
	t.Helper()
	ctx := t.Context()
	r := Inspect(ctx, survivor)
	if r.Err != nil || r.ID != "0" || r.ClusterID != "harness" || len(r.Members) != 3 || len(r.Snapshots) != 1 || r.Committed != r.Snapshots[0].Last.Index || r.Last.Index <= r.Committed {
		t.Fatalf("%+v", r)
	}
	encoded, err := json.Marshal(Inspect(ctx, dead))
	if err != nil {
		t.Fatal(err)
	}
	var other DirectoryReport // it came from another machine
	if err := json.Unmarshal(encoded, &other); err != nil {
		t.Fatal(err)
	}
	var refused *RecoverError
	if _, err := Recover(ctx, survivor, RecoverOptions{Lost: []NodeID{"2"}, Others: []DirectoryReport{other}}); !errors.As(err, &refused) || refused.Reason != RecoverBetter {
		t.Fatalf("beside a longer log: %v", err)
	}
	if _, err := Recover(ctx, dead, RecoverOptions{Lost: []NodeID{"2"}, Others: []DirectoryReport{r}}); !errors.As(err, &refused) || refused.Reason != RecoverQuorum {
		t.Fatalf("with two of three: %v", err)
	}
	o := RecoverOptions{Lost: []NodeID{"1", "2"}, DryRun: true}
	plan, err := Recover(ctx, survivor, o)
	if err != nil || !plan.Survey.MayBeLost || !strings.Contains(plan.String(), "nothing was changed") {
		t.Fatalf("%v, %v", plan, err)
	}
	if again := Inspect(ctx, survivor); again.String() != r.String() {
		t.Fatalf("a dry run made of\n%v\n%v", r, again)
	}
	o.DryRun = false
	if plan, err = Recover(ctx, survivor, o); err != nil || !strings.Contains(plan.String(), "done: ") || plan.Record.Kept != r.Last {
		t.Fatalf("%v, %v", plan, err)
	}
	now := Inspect(ctx, survivor)
	if now.Err != nil || now.ClusterUUID != plan.Record.To || now.ClusterUUID == r.ClusterUUID || len(now.Members) != 1 || now.Last != plan.Record.Next || now.Term != now.Last.Term || len(now.History) != 1 {
		t.Fatalf("recovered:\n%v", now)
	}
	if _, err = Recover(ctx, survivor, RecoverOptions{Lost: []NodeID{"1", "2"}}); !errors.As(err, &refused) || refused.Reason != RecoverQuorum {
		t.Fatalf("a second time: %v", err)
	}
	return plan
}

// goOn adds two nodes to a recovered one, after an old node has come back for a
// while, in virtual time.
func goOn(t *testing.T, g *Harness, plan RecoveryPlan) {
	t.Helper()
	s := g.Server(0)
	if st := s.Status(); len(st.History) != 1 || st.History[0].String() != plan.Record.String() || st.ClusterUUID != plan.Record.To || st.Term <= plan.Record.Next.Term {
		t.Fatalf("its status is %+v", st)
	}
	if !slices.ContainsFunc(eventsOf(s), func(e Event) bool { return e.Kind == EventHistory && strings.Contains(e.Detail, "quorum was lost") }) {
		t.Error("no event tells of the recovery")
	}
	if i := g.startNew(); i != 1 { // with its old directory
		t.Fatal(i)
	}
	time.Sleep(5 * time.Second)
	refusedByCluster(t, s)
	refusedByCluster(t, g.Server(1))
	if st := g.Server(1).Status(); st.Role == Leader || st.Leader != "" || s.Status().Role != Leader {
		t.Fatalf("an old node that came back is %v, with the leader %q", st.Role, st.Leader)
	}
	g.CrashPeer(1)
	if err := os.RemoveAll(g.nodes[1].disk.dir); err != nil {
		t.Fatal(err)
	}
	g.RestartPeer(1)
	if err := s.AddVoter(t.Context(), Member{ID: "1", Addr: harnessAddr(1)}); err != nil {
		t.Fatal(err)
	}
	g.Add()
	proposeN(t, g, "new", 5)
	for i := range 3 {
		caughtUp(t, g, i)
		if st := g.Server(i).Status(); st.First <= plan.Record.Next.Index {
			t.Errorf("node %d has entries from %d on, which are the old cluster's", i, st.First)
		}
	}
	g.CheckLogsMatch()
	g.CrashPeer(0)
	proposeN(t, g, "without", 2)
	g.RestartPeer(0)
	caughtUp(t, g, 0)
}

// A running node's directory is refused, by Inspect, by Recover, and among the
// others; so are a missing one and what is no data directory. Nothing is made.
func TestInspectRefuses(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, WithDisk(dir))
		defer h.Shutdown()
		h.CheckSingleLeader()
		h.CrashPeer(1)
		running, stopped := filepath.Join(dir, "0"), filepath.Join(dir, "1")
		var used *InUseError
		if r := Inspect(t.Context(), running); !errors.As(r.Err, &used) || !strings.Contains(r.Problem, "stop that one first") {
			t.Errorf("Inspect: %+v", r)
		}
		if _, err := Recover(t.Context(), running, RecoverOptions{Lost: []NodeID{"1", "2"}}); !errors.As(err, &used) {
			t.Errorf("Recover: %v", err)
		}
		if _, err := Recover(t.Context(), stopped, RecoverOptions{Lost: []NodeID{"0", "2"}, Others: []DirectoryReport{Inspect(t.Context(), running)}}); !errors.As(err, &used) {
			t.Errorf("Recover beside a running node: %v", err)
		}
		// The report may come from another machine, as JSON. Whose directory it is
		// is known, and that nobody may call it lost.
		var remote DirectoryReport
		if b, err := json.Marshal(Inspect(t.Context(), running)); err != nil || json.Unmarshal(b, &remote) != nil {
			t.Fatal(err)
		}
		if _, err := Recover(t.Context(), stopped, RecoverOptions{Lost: []NodeID{"0", "2"}, Others: []DirectoryReport{remote}}); !errors.As(err, &used) {
			t.Errorf("Recover beside a node that runs elsewhere: %v", err)
		}
		if _, err := RestoreBackup(t.Context(), running, bytes.NewReader(someBackup(t, "x")), *restoreOptions()); !errors.As(err, new(*RestoreError)) {
			t.Errorf("RestoreBackup: %v", err)
		}
	})
	missing, empty := filepath.Join(dir, "missing"), t.TempDir()
	for _, d := range []string{missing, empty} {
		before := listTree(t, d)
		if r := Inspect(t.Context(), d); !errors.Is(r.Err, fs.ErrNotExist) || !strings.Contains(r.Problem, "no data directory") {
			t.Errorf("%s: %+v", d, r)
		}
		if after := listTree(t, d); after != before {
			t.Errorf("%s: %q became %q", d, before, after)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r := Inspect(ctx, filepath.Join(dir, "1")); !errors.Is(r.Err, context.Canceled) {
		t.Errorf("a context that has ended: %+v", r)
	}
}

// oldDirectory makes a directory of node n in a cluster of three, with a
// snapshot up to entry 6, in a log of twelve; with replaced, the snapshot ends at
// entry 40, and the log does not say so yet.
func oldDirectory(t *testing.T, mem *vfs.Mem, replaced bool) {
	t.Helper()
	d := memoryDir(mem)
	rec := mustOpen2(t, d)
	conf := configuration{clusterUUID: [16]byte{8}, members: []member{
		{id: 1, name: "m", addr: "m:1", dirID: [16]byte{1}}, {id: 2, name: "n", addr: "n:1", dirID: rec.DirectoryID}, {id: 3, name: "o", addr: "o:1", dirID: [16]byte{3}}}}
	at := time.Unix(1000, 0)
	save := func(s Save) {
		d.Append(s)
		if _, err := d.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	save(Save{LSN: 1, HardState: &HardState{Term: 4, VotedFor: 3}, Entries: []Entries{makeEntry(entryConfiguration, EntryID{1, 0}, at, conf.encode())}})
	for i := Index(2); i <= 12; i++ {
		save(Save{LSN: LSN(i), Entries: []Entries{makeEntry(entryCommand, EntryID{i, 3}, at, fmt.Append(nil, i))}})
	}
	meta := SnapshotMeta{ID: [16]byte{6}, Last: EntryID{6, 3}, Time: at, ConfigIndex: 1, Config: conf.encode()}
	if replaced {
		meta.Last = EntryID{40, 5}
	}
	storeSnapshot(t, d, meta, "state")
	if !replaced {
		save(Save{LSN: 13, Start: &EntryID{4, 3}})
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func mustOpen2(t *testing.T, d *diskStorage) Recovered {
	t.Helper()
	rec, err := d.Open(t.Context(), Identity{"c", "n"})
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

var oldMembers = []NodeID{"m", "o"}

// Inspect says what is there, and changes nothing, whatever it finds.
func TestInspect(t *testing.T) {
	for _, replaced := range []bool{false, true} {
		mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
		oldDirectory(t, mem, replaced)
		mem.SetHook(func(op vfs.Op) error {
			if op.Kind.Changes() {
				t.Errorf("Inspect does %+v", op)
			}
			return nil
		})
		r := memoryDir(mem).inspect(t.Context())
		want := DirectoryReport{Last: EntryID{12, 3}, First: 5, Committed: 6, Term: 4}
		if replaced {
			want = DirectoryReport{Last: EntryID{40, 5}, First: 41, Committed: 40, Term: 5}
		}
		if r.Err != nil || r.Last != want.Last || r.First != want.First || r.Committed != want.Committed || r.Term != want.Term || r.VotedFor != "o" || r.ID != "n" || r.ConfigIndex != 1 || len(r.Members) != 3 || r.Starts != 1 || r.Copied || !r.LastTime.Equal(time.Unix(1000, 0)) {
			t.Errorf("%+v", r)
		}
		if r.ClusterUUID != hex.EncodeToString(append([]byte{8}, make([]byte, 15)...)) || !r.Members[1].Voter || !r.isOf(r.Members[1]) {
			t.Errorf("%+v", r)
		}
		if mem.OpenFiles() != 0 {
			t.Errorf("%d files are open", mem.OpenFiles())
		}
		for _, text := range []string{`"n" of cluster "c"`, "voted for o", "m at m:1, voter", "snapshot", "known to be committed, and of what follows a directory does not say"} {
			if !strings.Contains(r.String(), text) {
				t.Errorf("no %q in\n%s", text, r)
			}
		}
	}
}

// Damage anywhere in a directory is found and named, and is no reason to touch
// it; nothing is recovered from it.
func TestInspectDamage(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	oldDirectory(t, mem, false)
	snaps, err := mem.List("node/snap")
	if err != nil || len(snaps) != 1 {
		t.Fatal(snaps, err)
	}
	found := 0
	for _, c := range []struct {
		file string
		step int64
	}{{"node/identity", 1}, {"node/snap/" + snaps[0], 3}, {"node/wal/0000000000000001.wal", 97}} {
		f, err := mem.Open(c.file)
		if err != nil {
			t.Fatal(err)
		}
		size, _ := f.Size()
		f.Close()
		for off := int64(0); off < min(size, 40_000); off += c.step {
			rotten := mem.Clone()
			if err := rotten.FlipBit(c.file, off, uint(off%8)); err != nil {
				t.Fatal(err)
			}
			r := memoryDir(rotten).inspect(t.Context())
			if r.Err == nil {
				if r.String() != memoryDir(mem).inspect(t.Context()).String() {
					t.Fatalf("byte %d of %s: other contents:\n%s", off, c.file, r)
				}
				continue // padding
			}
			found++
			var corrupt *CorruptError
			var other *IdentityError
			if !errors.As(r.Err, &corrupt) && !errors.As(r.Err, &other) || r.Problem != r.Err.Error() {
				t.Fatalf("byte %d of %s: %v", off, c.file, r.Err)
			}
			_, err := recoverDirectory(t.Context(), func() *diskStorage { return memoryDir(rotten) }, &RecoverOptions{Lost: oldMembers}, time.Now())
			if err == nil || err.Error() != r.Problem {
				t.Fatalf("byte %d of %s: Recover says %v", off, c.file, err)
			}
		}
	}
	if found < 100 {
		t.Errorf("only %d times something was damaged", found)
	}
}

// A received snapshot that was to replace the log is damaged before the log says
// so. Inspect, Recover and a node all go on with the log that is there, and the
// damaged one takes no other one's place.
func TestRecoverBesideDamagedSnapshot(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	oldDirectory(t, mem, true)
	snaps, err := mem.List("node/snap")
	if err != nil || len(snaps) != 1 {
		t.Fatal(snaps, err)
	}
	if err := mem.FlipBit("node/snap/"+snaps[0], snapStateOffset(t, mem, "node/snap/"+snaps[0]), 1); err != nil {
		t.Fatal(err)
	}
	check := func(want EntryID) *diskStorage {
		t.Helper()
		d := memoryDir(mem)
		rec := mustOpen2(t, d)
		if l := newRaftLog(rec.Start, rec.Last, rec.Runs, rec.Tail); l.lastID() != want || rec.replacement() != nil || len(rec.Snapshots) != 0 {
			t.Fatalf("a node finds %+v", rec)
		}
		return d
	}
	if err := check(EntryID{12, 3}).Close(); err != nil {
		t.Fatal(err)
	}
	plan, err := recoverDirectory(t.Context(), func() *diskStorage { return memoryDir(mem) }, &RecoverOptions{Lost: oldMembers}, time.Unix(500, 0))
	if err != nil || plan.Record.Kept != (EntryID{12, 3}) {
		t.Fatalf("%v, %v", plan, err)
	}
	d := check(plan.Record.Next)
	meta := snapshotUpTo(plan.Record.Next.Index, plan.Record.Next.Term, 1)
	storeSnapshot(t, d, meta, "state")
	d.snapshots.makeSpace(syscall.ENOSPC)
	if _, r, err := d.OpenSnapshot(meta.Last); err != nil {
		t.Errorf("the only good snapshot is gone: %v", err)
	} else {
		r.(*snapshotFile).Close()
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// snapStateOffset is where a small snapshot's state ends.
func snapStateOffset(t *testing.T, fs vfs.FS, name string) int64 {
	t.Helper()
	info, err := fs.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size - 33
}

// makeCopy makes a copy of the directory: its identity file is another one.
func makeCopy(t *testing.T, mem *vfs.Mem) {
	t.Helper()
	f, err := mem.Open("node/identity")
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 200)
	n, _ := f.ReadAt(b, 0)
	f.Close()
	if err := mem.Remove("node/identity"); err != nil {
		t.Fatal(err)
	}
	if f, err = mem.Create("node/identity"); err == nil {
		_, err = f.WriteAt(b[:n], 0)
	}
	if err := errors.Join(err, f.Sync(), f.Close(), mem.SyncDir("node")); err != nil {
		t.Fatal(err)
	}
}

// recoverOld does Recover to what oldDirectory has made, and makeCopy.
func recoverOld(t *testing.T, mem *vfs.Mem, adopt bool) error {
	storage := func() *diskStorage {
		d := memoryDir(mem)
		d.adopt = adopt
		return d
	}
	_, err := recoverDirectory(t.Context(), storage, &RecoverOptions{Lost: oldMembers, AdoptCopy: adopt}, time.Unix(500, 0))
	return err
}

// A copy is noticed, refused, and recovered if that is asked for.
func TestRecoverCopy(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	oldDirectory(t, mem, false)
	makeCopy(t, mem)
	var refused *RecoverError
	if err := recoverOld(t, mem, false); !errors.As(err, &refused) || refused.Reason != RecoverCopy {
		t.Fatal(err)
	}
	if err := recoverOld(t, mem, true); err != nil {
		t.Fatal(err)
	}
	if r := memoryDir(mem).inspect(t.Context()); r.Err != nil || r.Copied || len(r.History) != 1 {
		t.Fatalf("%+v", r)
	}
}

// Power is cut before every operation of Recover that changes the disk. What is
// left is the directory as it was, which is recovered then, or the recovered one.
// One that was a copy stays one until it is recovered: until then its node would
// be a member of the old cluster.
func TestRecoverCrashPoints(t *testing.T) {
	for _, kind := range []struct{ replaced, copied bool }{{false, false}, {true, false}, {false, true}} {
		replaced := kind.replaced
		for seed := range uint64(3) {
			mem := vfs.NewMem(rand.New(rand.NewPCG(seed, 1)))
			oldDirectory(t, mem, replaced)
			if kind.copied {
				makeCopy(t, mem)
			}
			rng := rand.New(rand.NewPCG(seed, 2))
			points, outcomes := 0, map[string]int{}
			check := func(c *vfs.Mem) {
				outcomes[afterRecover(t, c, replaced, kind.copied)]++
				if t.Failed() {
					t.Fatalf("%+v, seed %d, crash before operation %d", kind, seed, points)
				}
			}
			mem.SetHook(func(op vfs.Op) error {
				if !op.Kind.Changes() {
					return nil
				}
				points++
				cold := mem.Clone()
				cold.Kill()
				check(cold)
				for _, choose := range []func(int) int{func(int) int { return 0 }, func(n int) int { return min(1, n-1) }, rng.IntN, rng.IntN} {
					check(mem.CrashClone(choose))
				}
				return nil
			})
			err := recoverOld(t, mem, kind.copied)
			mem.SetHook(nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []*vfs.Mem{mem.Clone(), mem.CrashClone(func(int) int { return 0 })} {
				if got := afterRecover(t, c, replaced, kind.copied); got != "recovered" {
					t.Fatalf("after Recover has returned, it is %s", got)
				}
			}
			t.Logf("%+v, seed %d: %d points: %v", kind, seed, points, outcomes)
			if outcomes["old"] == 0 || outcomes["recovered"] == 0 || points < 5 || kind.copied && outcomes["recovered, a copy"] == 0 {
				t.Errorf("%d points: %v", points, outcomes)
			}
		}
	}
}

// afterRecover says what a crash has left of Recover; one that had not happened
// is done now. A copy that was recovered and not taken over starts with AdoptDir.
func afterRecover(t *testing.T, mem *vfs.Mem, replaced, copied bool) string {
	t.Helper()
	kept := EntryID{12, 3}
	if replaced {
		kept = EntryID{40, 5}
	}
	outcome := "recovered"
	r := memoryDir(mem).inspect(t.Context())
	if r.Err != nil {
		t.Errorf("after a crash: %v", r.Err)
		return outcome
	}
	d := memoryDir(mem)
	switch {
	case len(r.History) == 0:
		outcome = "old"
		if r.Last != kept || len(r.Members) != 3 || r.VotedFor != "o" || r.Copied != copied {
			t.Errorf("neither as it was nor recovered:\n%s", r)
			return outcome
		}
		if err := recoverOld(t, mem, copied); err != nil {
			t.Error(err)
			return outcome
		}
	case r.Copied:
		outcome = "recovered, a copy"
		var refused *IdentityError
		if _, err := memoryDir(mem).Open(t.Context(), Identity{"c", "n"}); !errors.As(err, &refused) {
			t.Errorf("a copy started: %v", err)
		}
		if err := recoverOld(t, mem, true); err == nil || !strings.Contains(err.Error(), "start it once with AdoptDir") {
			t.Errorf("Recover says %v", err)
		}
		d.adopt = true
	}
	rec := mustOpen2(t, d)
	defer d.Close()
	l := newRaftLog(rec.Start, rec.Last, rec.Runs, rec.Tail)
	next := EntryID{kept.Index + 1, 2 * termStep}
	if at := lastTimeOf(rec.Tail[len(rec.Tail)-1]); !at.Equal(time.Unix(1000, 0)) {
		t.Errorf("the last entry's time is %v: time goes back along the log", at)
	}
	conf, err := decodeConfiguration(rec.Config)
	if err != nil || l.lastID() != next || rec.HardState != (HardState{Term: next.Term}) || len(conf.members) != 1 || rec.ConfigIndex != next.Index || len(rec.History) != 1 {
		t.Errorf("recovered %+v, %v", rec, err)
		return outcome
	}
	if m := conf.members[0]; m.name != "n" || m.addr != "n:1" || m.dirID != rec.DirectoryID || m.id != rec.ownNumber("n", rec.DirectoryID) || rec.History[0].Kept != kept {
		t.Errorf("recovered %+v, %v", m, rec.History)
	}
	if !replaced { // the log before it is untouched
		e, err := d.Read(5, 12, 1<<20)
		if err != nil || string(e[len(e)-1].data(e[len(e)-1].Len()-1)) != "12" {
			t.Errorf("%v", err)
		}
	}
	return outcome
}

// Every operation of Recover fails once: the directory is as it was or recovered,
// and no file is left open.
func TestRecoverDiskFailures(t *testing.T) {
	for _, broken := range []error{errors.New("input/output error"), syscall.ENOSPC} {
		for fail := 1; ; fail++ {
			mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
			oldDirectory(t, mem, false)
			failed := failOnce(mem, fail, broken)
			err := recoverOld(t, mem, false)
			mem.SetHook(nil)
			if failed.Size < 0 {
				if fail < 30 {
					t.Errorf("only %d operations", fail)
				}
				break
			}
			if mem.OpenFiles() != 0 {
				t.Fatalf("operation %d, %+v, failed: %v; %d files are open", fail, failed, err, mem.OpenFiles())
			}
			mem.DropCaches()
			if got := afterRecover(t, mem, false, false); err == nil && got != "recovered" || t.Failed() {
				t.Fatalf("operation %d, %+v, failed: %v, and it is %s", fail, failed, err, got)
			}
		}
	}
}

// A node that runs between the look and the write is noticed.
func TestRecoverChanged(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	oldDirectory(t, mem, false)
	calls := 0
	storage := func() *diskStorage {
		if calls++; calls == 2 {
			d := memoryDir(mem)
			mustOpen2(t, d)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
		return memoryDir(mem)
	}
	var refused *RecoverError
	if _, err := recoverDirectory(t.Context(), storage, &RecoverOptions{Lost: oldMembers}, time.Now()); !errors.As(err, &refused) || refused.Reason != RecoverChanged {
		t.Fatal(err)
	}
	if r := memoryDir(mem).inspect(t.Context()); r.Err != nil || len(r.History) != 0 || r.Last.Index != 12 {
		t.Fatalf("%+v", r)
	}
}

// A recovered leader adds nobody before it has dropped the log that it inherited;
// AddVoter sees to that, and says why it can't.
func TestInheritedLog(t *testing.T) {
	old, own := configuration{clusterUUID: [16]byte{1}, members: []member{{id: 1, name: "a"}, {id: 2, name: "b"}}}, configuration{clusterUUID: [16]byte{2}, members: []member{{id: 9 << 8, name: "a"}}}
	rec := Recovered{HardState: HardState{Term: 3}, Last: 9, Runs: []EntryID{{1, 0}, {2, 1}, {9, 3}}, Config: own.encode(), ConfigIndex: 9, older: []configAt{{1, old.encode()}}}
	rec.Tail = []Entries{makeEntry(entryConfiguration, EntryID{9, 3}, time.Unix(9, 0), own.encode())}
	c := newCore(9<<8, limits{electionTimeout: time.Second, heartbeatInterval: time.Second / 10, maxFrameBytes: 1 << 20, maxInflight: 8, maxInflightBytes: 1 << 20, maxTailBytes: 1 << 20, maxUncommittedSize: 1 << 20}, rec, own, rand.New(rand.NewPCG(1, 1)), time.Unix(10, 0))
	c.name = "a"
	c.now = c.electionDeadline
	c.tick()
	c.persisted(c.finish().save.LSN, 0)
	c.finish()
	add := func(list []Member) ([]Member, error) { return append(list, Member{ID: "b", Addr: "b:1"}), nil }
	var refused *MembershipError
	if _, err := c.changeMembers(add); c.role != Leader || c.commitIndex != 10 || !errors.As(err, &refused) || refused.Reason != MembershipTooEarly {
		t.Fatalf("role %v, commit %d: %v", c.role, c.commitIndex, err)
	}
	c.snapshotTaken(EntryID{8, 1}, 0)
	if c.log.start.Index != 8 {
		t.Fatalf("the log begins after %d", c.log.start.Index)
	}
	if _, err := c.changeMembers(add); !errors.As(err, &refused) {
		t.Fatal("somebody is added who would be sent the configuration", err)
	}
	c.snapshotTaken(EntryID{10, 4}, 0)
	if _, err := c.changeMembers(add); err != nil || c.log.start.Index != 9 {
		t.Fatalf("the log begins after %d: %v", c.log.start.Index, err)
	}
}

// Sessions that the old cluster opened on lost nodes keep their numbers: the new
// one gives those indexes to others.
func TestSessionIDsAfterRecovery(t *testing.T) {
	lost, later := sessionIDOf(EntryID{60, 7}), sessionIDOf(EntryID{60, Term(raised(7, termStep)) + 1})
	if lost != 60 || later == lost || later <= sessionIDOf(EntryID{indexStep - 1, termStep - 1}) {
		t.Errorf("%d and %d", lost, later)
	}
}

// A state machine on disk goes on with its database after a recovery.
func TestRecoverOnDisk(t *testing.T) {
	before := t.TempDir()
	onTables(t, 3, func(t *testing.T, h *Harness, tables []*table) {
		proposeN(t, h, "a", 5)
		h.Shutdown()
		_, err := Recover(t.Context(), filepath.Join(before, "0"), RecoverOptions{Lost: []NodeID{"1", "2"}})
		if err != nil {
			t.Fatal(err)
		}
		grown := []*table{tables[0], {}}
		g := NewHarness(t, 1, WithDisk(before), WithStateMachineOf(func(i int) StateMachine { return tableMachine{grown[i]} }))
		defer g.Shutdown()
		if err := os.RemoveAll(filepath.Join(before, "1")); err != nil {
			t.Fatal(err)
		}
		g.Add()
		proposeN(t, g, "b", 1)
		for i := range 2 {
			if got := tableLines(g, i); got != "a0 a1 a2 a3 a4 b0" {
				t.Errorf("node %d has %q", i, got)
			}
		}
		if tables[0].restores != 0 {
			t.Error("its state was restored")
		}
	}, WithDisk(before))
}
