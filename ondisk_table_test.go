package raft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The table that a state machine on disk keeps for the library: what each
// transaction changes adds up to the table, and nothing else is believed.

// storedTable is a database of which a power cut loses the newest transactions.
type storedTable struct {
	t        *rapid.T
	table    *sessionTable
	versions []tableVersion
}

func (d *storedTable) newest() tableVersion {
	if len(d.versions) == 0 {
		return tableVersion{}
	}
	return d.versions[len(d.versions)-1]
}

// store makes a transaction of changes, each of which must change something,
// and reads back what the database has then.
func (d *storedTable) store(old tableVersion, meta SnapshotMeta, changes []MetaChange) {
	d.t.Helper()
	seen := map[string]bool{}
	for _, c := range changes {
		key := string(c.Key)
		before, known := old.meta[key]
		if c.Value == nil && !known || known && before == string(c.Value) || seen[key] || len(c.Key) == 0 || c.Value != nil && len(c.Value) == 0 {
			d.t.Fatalf("key %x is set from %x to %x, which changes nothing, or it is there twice", c.Key, before, c.Value)
		}
		seen[key] = true
	}
	d.versions = append(d.versions, tableVersion{meta: old.change(changes)})
	got, loaded := d.load()
	if got.Last != meta.Last || !got.Time.Equal(meta.Time) || got.ConfigIndex != meta.ConfigIndex || !bytes.Equal(got.Config, meta.Config) {
		d.t.Fatalf("the database says %+v, want %+v", got, meta)
	}
	if !bytes.Equal(loaded.encode(nil), d.table.encode(nil)) || loaded.bytes != d.table.bytes {
		d.t.Fatalf("up to entry %d the database has %d sessions, %d bytes, want %d, %d, or they differ", meta.Last.Index, len(loaded.byID), loaded.bytes, len(d.table.byID), d.table.bytes)
	}
	if whole := (tableVersion{}).change(loaded.rows(got)); !maps.Equal(whole, d.newest().meta) {
		d.t.Fatalf("the database has %d rows, %d are needed, or they differ", len(d.newest().meta), len(whole))
	}
}

func (d *storedTable) load() (*SnapshotMeta, *sessionTable) {
	d.t.Helper()
	rows := rapid.Permutation(d.newest().rows()).Draw(d.t, "order of rows")
	meta, table, err := decodeMeta(rows)
	if err != nil {
		d.t.Fatal(err)
	}
	return meta, table
}

// Whatever sessions are opened, used, closed, expired and displaced, the
// transactions add up to the table: also where the newest are lost and the log
// brings them back, and where the state was restored from a snapshot.
func TestMetaChangesAddUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ops := drawSessionOps(t)
		want, single := [][]byte{nil}, newSessionTable()
		for i := range ops {
			applyOps(t, single, i, ops[i:i+1], nil)
			want = append(want, single.encode(nil))
		}
		d := &storedTable{t: t, table: newSessionTable()}
		metaAt := func(i Index) SnapshotMeta {
			meta := snapshotUpTo(i, 1, byte(2+i/20)) // the configuration changes now and then
			meta.ID = [16]byte{}
			return meta
		}
		restarts := 8
		for next := 0; next < len(ops); {
			n := rapid.IntRange(1, min(len(ops)-next, 20)).Draw(t, "run")
			applyOps(t, d.table, next, ops[next:next+n], func(p *portion) {
				if len(p.commands) > 0 { // otherwise there is no transaction
					meta := metaAt(p.run.First() + Index(p.to-1))
					d.store(d.newest(), meta, d.table.changes(&meta, p.sessions))
				}
			})
			if next += n; !bytes.Equal(d.table.encode(nil), want[next]) {
				t.Fatalf("after entry %d the table differs", next)
			}
			switch action := rapid.SampledFrom([]string{"", "", "", "restart", "snapshot"}).Draw(t, "then"); {
			case action == "snapshot":
				restored, err := decodeSessions(want[next])
				if err != nil {
					t.Fatal(err)
				}
				d.table = restored
				meta := metaAt(Index(next))
				d.store(tableVersion{}, meta, restored.rows(&meta))
			case action == "restart" && restarts > 0:
				restarts--
				lost := min(rapid.SampledFrom([]int{0, 0, 1, 3, 99}).Draw(t, "lost"), len(d.versions))
				d.versions = d.versions[:len(d.versions)-lost]
				if next, d.table = 0, newSessionTable(); len(d.versions) > 0 {
					var meta *SnapshotMeta
					meta, d.table = d.load()
					next = int(meta.Last.Index)
				}
			}
		}
	})
}

// deltaMachine keeps nothing but the library's table, and counts what each
// transaction writes there.
type deltaMachine struct {
	tableVersion
	last  []MetaChange
	bytes int
}

func (m *deltaMachine) Apply(Entry) []byte      { panic("Apply of a machine on disk") }
func (m *deltaMachine) Restore(io.Reader) error { panic("Restore of a machine on disk") }

func (m *deltaMachine) Snapshot() (Capture, error) { return CaptureBytes(nil), nil }

func (m *deltaMachine) RestoreOnDisk(io.Reader, []MetaChange) error {
	return errors.New("this test takes no snapshot")
}

func (m *deltaMachine) LoadMeta(each func(key, value []byte) error) error { return m.each(each) }

func (m *deltaMachine) ApplyOnDisk(entries []Entry, results [][]byte, meta func() []MetaChange) error {
	for i := range entries {
		results[i] = bytes.Repeat([]byte("r"), 100)
	}
	m.last, m.bytes = meta(), 0
	for _, c := range m.last {
		m.bytes += len(c.Key) + len(c.Value)
		if m.meta[string(c.Key)] = string(c.Value); c.Value == nil {
			delete(m.meta, string(c.Key))
		}
	}
	return nil
}

// With a thousand sessions that keep three results each, a transaction writes
// what its request changed, and after a restart all of it is there.
func TestMetaDelta(t *testing.T) {
	const sessions, results = 1000, 3
	machine := &deltaMachine{tableVersion: tableVersion{meta: map[string]string{}}}
	virtual(t, 1, func(t *testing.T, h *Harness) {
		ids := make([]SessionID, sessions)
		once := func(id RequestID) Result {
			r, err := h.Server(0).ProposeOnce(t.Context(), id, []byte("x"))
			if err != nil {
				t.Fatalf("%+v: %v", id, err)
			}
			return r
		}
		for i := range ids {
			var err error
			if ids[i], err = h.Server(0).OpenSession(t.Context()); err != nil {
				t.Fatal(err)
			}
			for seq := range uint64(results) {
				once(RequestID{Session: ids[i], Seq: seq + 1})
			}
		}
		changed := func() (keys []string) {
			for _, c := range machine.last {
				keys = append(keys, fmt.Sprintf("%x %d", c.Key, len(c.Value)))
			}
			return keys
		}
		whole := 0
		for k, v := range machine.meta {
			whole += len(k) + len(v)
		}
		want := once(RequestID{Session: ids[7], Seq: 4, DoneBelow: 2})
		id := func(i int) string { return fmt.Sprintf("%016x", uint64(ids[i])) }
		keys := []string{"01 37", "05" + id(7) + "0000000000000001 0", "05" + id(7) + " 24", "05" + id(7) + "0000000000000004 124"}
		t.Logf("a request writes %d bytes, the table has %d in %d rows", machine.bytes, whole, len(machine.meta))
		if !slices.Equal(changed(), keys) || machine.bytes > 250 {
			t.Errorf("a request changes %q, %d bytes, want %q", changed(), machine.bytes, keys)
		}
		if _, err := h.Server(0).Propose(t.Context(), []byte("x")); err != nil || !slices.Equal(changed(), keys[:1]) {
			t.Errorf("a command without a session changes %q, want %q, %v", changed(), keys[:1], err)
		}
		h.CrashPeer(0)
		h.RestartPeer(0)
		applied := machine.last
		for i := range ids {
			if i != 7 {
				once(RequestID{Session: ids[i], Seq: results})
			} else if r := once(RequestID{Session: ids[i], Seq: 4, DoneBelow: 2}); r.Index != want.Index {
				t.Errorf("answered as entry %d, before as %d", r.Index, want.Index)
			}
		}
		if &applied[0] != &machine.last[0] {
			t.Error("after the restart something was executed again")
		}
	}, WithStateMachineOf(func(int) StateMachine { return machine }))
}

// exampleRows is the table that docs/FORMAT.md shows.
func exampleRows() []MetaChange {
	conf := configuration{members: []member{{id: 1, name: "a", addr: "b:1"}}}
	rows := exampleSessions().rows(&SnapshotMeta{Last: EntryID{6, 1}, Time: time.Unix(0, 8), ConfigIndex: 1, Config: conf.encode()})
	slices.SortFunc(rows, func(a, b MetaChange) int { return bytes.Compare(a.Key, b.Key) })
	return rows
}

// TestMetaExample: docs/FORMAT.md shows the exact bytes of a table.
func TestMetaExample(t *testing.T) {
	doc, err := os.ReadFile("docs/FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	_, shown, _ := strings.Cut(string(doc), "```rows\n")
	shown, _, _ = strings.Cut(shown, "```")
	var want strings.Builder
	for _, row := range exampleRows() {
		fmt.Fprintf(&want, "%x\n%s", row.Key, strings.ReplaceAll("    "+strings.TrimSuffix(hexLines(row.Value), "\n"), "\n", "\n    ")+"\n")
	}
	if shown != want.String() {
		t.Errorf("docs/FORMAT.md shows\n%s\nthe code writes\n```rows\n%s```", shown, want.String())
	}
}

// sumUp gives rows a first row that stands for them.
func sumUp(rows []MetaChange) []MetaChange {
	var r storedRows
	rows = slices.DeleteFunc(rows, func(row MetaChange) bool { return bytes.Equal(row.Key, []byte{rowFirst}) })
	for _, row := range rows {
		r.sum += markOf(row.Key, row.Value)
	}
	return append(rows, MetaChange{[]byte{rowFirst}, r.first(&SnapshotMeta{Last: EntryID{6, 1}, Time: time.Unix(0, 8)})})
}

func wantMetaError(t *testing.T, rows []MetaChange, want, do string) {
	t.Helper()
	_, _, err := decodeMeta(rows)
	if e := (*MetaError)(nil); !errors.As(err, &e) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), do) {
		t.Errorf("%v, want a *MetaError with %q and %q", err, want, do)
	}
}

// A row that is missing, left over, stale, damaged, given twice or of another
// version is found, whichever it is.
func TestMetaDamage(t *testing.T) {
	n := len(exampleRows())
	if _, _, err := decodeMeta(exampleRows()); err != nil || n != 6 {
		t.Fatalf("%d rows, %v", n, err)
	}
	for i := range n {
		rows := exampleRows()
		wantMetaError(t, slices.Delete(rows, i, i+1), "missing", "start with an empty one")
		rows = append(exampleRows(), exampleRows()[i])
		wantMetaError(t, rows, fmt.Sprintf("at key %x: it was given twice", exampleRows()[i].Key), "LoadMeta must give each key once")
		for at := range exampleRows()[i].Value {
			rows = exampleRows()
			rows[i].Value[at] ^= 4
			wantMetaError(t, rows, "", "start with an empty one")
			rows = exampleRows()
			rows[i].Value = rows[i].Value[:at]
			wantMetaError(t, rows, "", "start with an empty one")
		}
		rows = exampleRows()
		rows[i].Key = append(rows[i].Key, 0)
		wantMetaError(t, rows, "", "start with an empty one")
	}
	old := sessionKey(99)
	wantMetaError(t, append(exampleRows(), MetaChange{old, make([]byte, sessionRowBytes)}), "left over", "none that was removed")
	newer := exampleRows()
	newer[0].Value[0] = metaVersion + 1
	binary.LittleEndian.PutUint32(newer[0].Value[1:], firstRowCRC(newer[0].Value))
	wantMetaError(t, newer, "at key 01: it has version 2, this program knows 1", "run the version that wrote it")
}

// Rows that contradict each other are refused, also where their sum is right.
func TestMetaContradictions(t *testing.T) {
	session := func(used, floor, place uint64) []byte { return appendUint64s(nil, used, floor, place) }
	for name, c := range map[string]struct {
		key, value []byte // set or added; removed if the value is nil
		want       string
	}{
		"no bounds":                  {[]byte{rowLimits}, nil, "at key 03: there are sessions, and no bounds"},
		"empty bounds":               {[]byte{rowLimits}, make([]byte, 40), "at key 03: it is malformed"},
		"short bounds":               {[]byte{rowLimits}, make([]byte, 39), "malformed"},
		"no configuration":           {[]byte{rowConfiguration}, nil, "there is no configuration"},
		"a bad configuration":        {[]byte{rowConfiguration}, make([]byte, 40), "at key 02: raft: configuration"},
		"a later configuration":      {[]byte{rowConfiguration}, append([]byte{7}, exampleRows()[1].Value[1:]...), "of a later entry"},
		"no such reason":             {[]byte{rowEnded}, append(appendUint64s(nil, 4), 9), "at key 04: it is malformed"},
		"half of one that ended":     {[]byte{rowEnded}, make([]byte, 4), "malformed"},
		"nobody that ended":          {[]byte{rowEnded}, []byte{}, "malformed"},
		"too many that ended":        {[]byte{rowEnded}, bytes.Repeat(append(appendUint64s(nil, 4), 1), maxEnded+1), "malformed"},
		"a short session":            {sessionKey(5), make([]byte, 23), "malformed"},
		"a session's short key":      {[]byte{rowSession, 1}, session(8, 0, 9), "no row has such a key"},
		"a result's long key":        {append(resultKey(3, 2), 1), make([]byte, resultRowHead), "no row has such a key"},
		"one place for two":          {sessionKey(5), session(7, 0, 3), "two sessions have one place"},
		"no place":                   {sessionKey(5), session(0, 0, 0), "two sessions have one place"},
		"used later and placed less": {sessionKey(5), session(100, 0, 1), "not the order of time"},
		"nobody's result":            {resultKey(9, 1), make([]byte, resultRowHead), "there is no such session"},
		"a result of no request":     {resultKey(3, 0), make([]byte, resultRowHead), "no use for this result"},
		"a result below the floor":   {sessionKey(3), session(7, 3, 3), "no use for this result"},
		"a short result":             {resultKey(3, 9), make([]byte, resultRowHead-1), "malformed"},
		"too large, and kept":        {resultKey(3, 9), append(appendUint64s(nil, 1, 1, 1), 'x'), "malformed"},
		"a key of the future":        {[]byte{rowSession + 1}, []byte{1}, "no row has such a key"},
		"an empty key":               {nil, []byte{1}, "the first row"},
		"a single row's longer key":  {[]byte{rowLimits, 0}, make([]byte, 40), "no row has such a key"},
	} {
		t.Run(name, func(t *testing.T) {
			rows := slices.DeleteFunc(exampleRows(), func(row MetaChange) bool { return bytes.Equal(row.Key, c.key) })
			if c.value != nil {
				rows = append(rows, MetaChange{c.key, c.value})
			}
			wantMetaError(t, sumUp(rows), c.want, "start with an empty one")
		})
	}
	zero := sumUp(exampleRows())
	first := zero[len(zero)-1].Value
	copy(first[5:], make([]byte, 8))
	binary.LittleEndian.PutUint32(first[1:], firstRowCRC(first))
	wantMetaError(t, zero, "at key 01: its 37 bytes are malformed", "start with an empty one")
}

// Rows of any kind are refused or stand for a table that has exactly these rows.
func FuzzMeta(f *testing.F) {
	var seed []byte
	for _, row := range exampleRows()[1:] {
		seed = append(append(append(seed, byte(len(row.Key)), byte(len(row.Value))), row.Key...), row.Value...)
	}
	f.Add(seed)
	f.Add(seed[:len(seed)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		var rows []MetaChange
		for r := (reader{b: b}); len(r.b) > 0 && r.err == nil; {
			key, value := uint64(r.byte()), uint64(r.byte())
			if row := (MetaChange{r.bytes(key), r.bytes(value)}); r.err == nil {
				rows = append(rows, row)
			}
		}
		rows = sumUp(rows)
		meta, table, err := decodeMeta(slices.Clone(rows))
		if e := (*MetaError)(nil); err != nil && !errors.As(err, &e) {
			t.Fatalf("not a *MetaError: %v", err)
		}
		if err != nil {
			return
		}
		again := table.rows(meta)
		for _, list := range [][]MetaChange{rows, again} {
			slices.SortFunc(list, func(a, b MetaChange) int { return cmp.Or(bytes.Compare(a.Key, b.Key), bytes.Compare(a.Value, b.Value)) })
		}
		if !slices.EqualFunc(rows, again, func(a, b MetaChange) bool { return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) }) {
			t.Fatalf("%x became %x", rows, again)
		}
	})
}
