package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// table is a database with one transaction after the other, of which a power
// cut may lose the newest ones.
type table struct {
	versions []tableVersion // oldest first; the last is what readers see
	applies  int            // commands executed, also before a crash
	restores int
	changes  [][]MetaChange // of each transaction, also before a crash
	fault    error
}

type tableVersion struct {
	lines []string
	meta  map[string]string
}

// change makes changes in a copy of the library's table.
func (v tableVersion) change(meta []MetaChange) map[string]string {
	rows := map[string]string{}
	maps.Copy(rows, v.meta)
	for _, c := range meta {
		if rows[string(c.Key)] = string(c.Value); c.Value == nil {
			delete(rows, string(c.Key))
		}
	}
	return rows
}

func (v tableVersion) each(f func(key, value []byte) error) error {
	for k, value := range v.meta { // in any order
		if err := f([]byte(k), []byte(value)); err != nil {
			return err
		}
	}
	return nil
}

// rows returns the library's table in the order of its keys.
func (v tableVersion) rows() (rows []MetaChange) {
	for _, k := range slices.Sorted(maps.Keys(v.meta)) {
		rows = append(rows, MetaChange{[]byte(k), []byte(v.meta[k])})
	}
	return rows
}

func (d *table) newest() tableVersion {
	if len(d.versions) == 0 {
		return tableVersion{}
	}
	return d.versions[len(d.versions)-1]
}

// lose forgets the newest n transactions.
func (d *table) lose(n int) { d.versions = d.versions[:max(0, len(d.versions)-n)] }

// tableMachine is the OnDisk state machine over a table.
type tableMachine struct{ *table }

func (m tableMachine) Apply(Entry) []byte      { panic("Apply of a machine on disk") }
func (m tableMachine) Restore(io.Reader) error { panic("Restore of a machine on disk") }
func (m tableMachine) Snapshot() (Capture, error) {
	return CaptureBytes(strings.Join(m.newest().lines, "\n")), nil
}

func (m tableMachine) LoadMeta(each func(key, value []byte) error) error {
	if m.fault != nil {
		return m.fault
	}
	return m.newest().each(each)
}

func (m tableMachine) ApplyOnDisk(entries []Entry, results [][]byte, meta func() []MetaChange) error {
	if m.fault != nil {
		return m.fault
	}
	lines := slices.Clone(m.newest().lines)
	for i, e := range entries {
		lines = append(lines, string(e.Data))
		results[i] = fmt.Append(nil, len(lines))
		m.applies++
	}
	m.changes = append(m.changes, meta())
	m.versions = append(m.versions, tableVersion{lines, m.newest().change(meta())})
	return nil
}

func (m tableMachine) RestoreOnDisk(r io.Reader, meta []MetaChange) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	m.restores++
	m.versions = append(m.versions, tableVersion{strings.Split(string(b), "\n"), tableVersion{}.change(meta)})
	return nil
}

func tableLines(h *Harness, i int) string {
	return string(h.Read(i, func(m StateMachine) []byte { return []byte(strings.Join(m.(tableMachine).newest().lines, " ")) }))
}

// onTables runs f with a cluster whose nodes keep their state in tables.
func onTables(t *testing.T, n int, f func(t *testing.T, h *Harness, tables []*table), opts ...HarnessOption) {
	t.Helper()
	tables := make([]*table, n)
	for i := range tables {
		tables[i] = &table{}
	}
	snapshots(t, n, func(t *testing.T, h *Harness) { f(t, h, tables) },
		append(opts, WithStateMachineOf(func(i int) StateMachine { return tableMachine{tables[i]} }))...)
}

// A restarted node neither restores nor applies again what its database has;
// what the database lost comes from the log.
func TestOnDiskRestart(t *testing.T) {
	for _, lost := range []int{0, 3} {
		onTables(t, 1, func(t *testing.T, h *Harness, tables []*table) {
			proposeN(t, h, "a", 10)
			want, applied := tableLines(h, 0), tables[0].applies
			h.CrashPeer(0)
			tables[0].lose(lost)
			h.RestartPeer(0)
			if st := h.Server(0).Status(); st.Applied == 0 || st.Commit < st.Applied {
				t.Fatalf("it starts with %+v", st)
			}
			proposeN(t, h, "b", 1)
			if got := tableLines(h, 0); got != want+" b0" {
				t.Fatalf("it has %q, want %q and b0", got, want)
			}
			if again := tables[0].applies - applied - 1; again != lost {
				t.Fatalf("%d commands were applied again, %d were lost", again, lost)
			}
		})
	}
}

// The state is behind, at, or ahead of the snapshot: only what the log does not
// reach back to is restored.
func TestOnDiskAndSnapshot(t *testing.T) {
	for name, c := range map[string]struct{ after, lost, restores int }{
		"at the snapshot":                 {0, 0, 0},
		"ahead of it":                     {4, 0, 0},
		"behind it, and the log is short": {4, 9, 1},
		"empty":                           {0, 99, 1},
	} {
		t.Run(name, func(t *testing.T) {
			onTables(t, 1, func(t *testing.T, h *Harness, tables []*table) {
				proposeN(t, h, "a", 10)
				h.TakeSnapshot(0)
				proposeN(t, h, "b", c.after)
				want := tableLines(h, 0)
				h.CrashPeer(0)
				tables[0].lose(c.lost)
				h.RestartPeer(0)
				proposeN(t, h, "c", 1)
				if got := tableLines(h, 0); got != want+" c0" {
					t.Fatalf("it has %q, want %q and c0", got, want)
				}
				if tables[0].restores != c.restores {
					t.Fatalf("restored %d times, want %d", tables[0].restores, c.restores)
				}
			})
		})
	}
}

// A follower that is sent a snapshot restores it once, with what it includes in
// the same transaction.
func TestOnDiskFollower(t *testing.T) {
	onTables(t, 3, func(t *testing.T, h *Harness, tables []*table) {
		leader, behind := leaveBehind(t, h)
		h.ReconnectPeer(behind)
		proposeN(t, h, "b", 2)
		want := tableLines(h, leader)
		waitApplied(t, h, behind, h.Server(leader).Status().Applied)
		if got := tableLines(h, behind); got != want || tables[behind].restores != 1 {
			t.Fatalf("after %d restores it has %q, want %q", tables[behind].restores, got, want)
		}
		h.CrashPeer(behind)
		h.RestartPeer(behind)
		waitApplied(t, h, behind, h.Server(leader).Status().Applied)
		if got := tableLines(h, behind); got != want || tables[behind].restores != 1 {
			t.Fatalf("after a restart and %d restores it has %q, want %q", tables[behind].restores, got, want)
		}
	})
}

func waitApplied(t *testing.T, h *Harness, i int, index Index) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := h.Server(i).WaitApplied(ctx, index); err != nil {
		t.Fatalf("node %d did not apply entry %d: %v", i, index, err)
	}
}

// Nothing is applied that the node's own log on disk lacks, also where a
// majority of the others has it: else a power cut would leave the database ahead.
func TestOnDiskWaitsForItsLog(t *testing.T) {
	onTables(t, 3, func(t *testing.T, h *Harness, tables []*table) {
		proposeN(t, h, "a", 3)
		leader, _ := h.CheckSingleLeader()
		before := tableLines(h, leader)
		h.SlowDisk(leader, 10*time.Second)
		h.SubmitToServer(leader, []byte("b")) // the two others commit it
		time.Sleep(time.Second)
		st := h.Server(leader).Status()
		if got := tableLines(h, leader); got != before || st.Commit <= st.Durable {
			t.Fatalf("it applied %q, and its log on disk ends with %q: %+v", got, before, st)
		}
		time.Sleep(20 * time.Second)
		if got := tableLines(h, leader); got != before+" b" {
			t.Fatalf("with its disk done it has %q", got)
		}
		h.SlowDisk(leader, 0)
	})
}

// A database that includes what the log does not have is refused, and so is one
// that can't be read.
func TestOnDiskRefusals(t *testing.T) {
	other := snapshotUpTo(3, 99, 1)
	ahead := snapshotUpTo(1000, 1, 1)
	for name, c := range map[string]struct {
		meta  []MetaChange
		fault error
		want  string
	}{
		"ahead":      {newSessionTable().rows(&ahead), nil, "includes entry 1000"},
		"another":    {newSessionTable().rows(&other), nil, "includes entry 3 of term 99"},
		"garbage":    {[]MetaChange{{[]byte("garbage"), []byte("x")}}, nil, "start with an empty one"},
		"unreadable": {nil, errors.New("table is locked"), "table is locked"},
	} {
		t.Run(name, func(t *testing.T) {
			onTables(t, 1, func(t *testing.T, h *Harness, tables []*table) {
				proposeN(t, h, "a", 5)
				h.CrashPeer(0)
				tables[0].versions = append(tables[0].versions, tableVersion{meta: tableVersion{}.change(c.meta)})
				tables[0].fault = c.fault
				if err := h.tryStart(0); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("Start: %v, want %q", err, c.want)
				}
				tables[0].lose(1)
				tables[0].fault = nil
				h.RestartPeer(0)
				proposeN(t, h, "b", 1)
			})
		})
	}
}

// A failed transaction stops applying, and a restart goes on with it.
func TestOnDiskFails(t *testing.T) {
	onTables(t, 1, func(t *testing.T, h *Harness, tables []*table) {
		proposeN(t, h, "a", 3)
		full := errors.New("no space left")
		h.Read(0, func(StateMachine) []byte { tables[0].fault = full; return nil })
		_, err := h.Server(0).Propose(t.Context(), []byte("b"))
		if !errors.Is(err, full) || !errors.Is(err, ErrOutcomeUnknown) {
			t.Fatalf("Propose: %v", err)
		}
		h.CrashPeer(0)
		tables[0].fault = nil
		h.RestartPeer(0)
		proposeN(t, h, "c", 1)
		if got := tableLines(h, 0); got != "a0 a1 a2 b c0" {
			t.Fatalf("it has %q", got)
		}
	})
}

// A snapshot that was received to replace the log is damaged, and the node stops
// before the log says so. A machine on disk goes on with its database and the log.
func TestOnDiskDamagedReplacement(t *testing.T) {
	onTables(t, 1, func(t *testing.T, h *Harness, tables []*table) {
		proposeN(t, h, "a", 5)
		h.CrashPeer(0)
		d := newDiskStorage(&Config{Dir: "data"})
		d.fs = h.node(0).disk.mem
		rec, err := d.Open(t.Context(), Identity{"harness", "0"})
		if err != nil {
			t.Fatal(err)
		}
		storeSnapshot(t, d, SnapshotMeta{ID: [16]byte{9}, Last: EntryID{1000, rec.HardState.Term + 1}, ConfigIndex: rec.ConfigIndex, Config: rec.Config}, "state")
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		damageSnapshot(t, h, 0, 0, 33)
		h.RestartPeer(0)
		proposeN(t, h, "b", 1)
		if got := tableLines(h, 0); got != "a0 a1 a2 a3 a4 b0" || tables[0].restores != 0 {
			t.Errorf("it has %q after %d restores", got, tables[0].restores)
		}
	})
}
