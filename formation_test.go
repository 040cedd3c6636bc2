package raft

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func founderList(n int) (list []Member) {
	for i := range n {
		list = append(list, Member{ID: NodeID(fmt.Sprintf("n%d", i)), Addr: fmt.Sprintf("10.0.0.%d:7000", i)})
	}
	return list
}

func startFormation(t interface{ Fatal(...any) }, self NodeID, dir byte, list []Member) *formation {
	f, err := newFormation("demo", self, dirOf(dir), list)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// across sends an answer through its encoding.
func across(t interface{ Fatal(...any) }, a formAnswer) formAnswer {
	got, err := decodeFormAnswer(a.encode(nil))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestOneFounderFormsAtOnce(t *testing.T) {
	f := startFormation(t, "a", 1, []Member{{ID: "a", Addr: "x:1"}})
	if !f.done() || len(f.missing()) != 0 {
		t.Fatal("one founder waits for somebody")
	}
	e := f.entry1()
	if e.First() != 1 || e.Len() != 1 || e.kind(0) != entryConfiguration || e.term(0) != 0 || !bytes.Equal(e.Encoded()[24:32], make([]byte, 8)) {
		t.Errorf("entry 1 is %+v", e.entry(0))
	}
	if f.answer().formed() {
		t.Error("entry 1 is told before it is durable")
	}
	f.saved()
	if a := f.answer(); !bytes.Equal(a.Entry1, e.Encoded()) {
		t.Errorf("the answer is %+v", a)
	}
	conf, self := f.configuration()
	if self != 1 || len(conf.members) != 1 || conf.members[0].name != "a" || conf.members[0].dirID != dirOf(1) {
		t.Errorf("configuration %+v, self %d", conf, self)
	}
}

// TestFoundersDeriveTheSameEntry: however answers are ordered, repeated or
// lost, and whoever saves when, all founders end with the same bytes, member
// IDs are positions by name, and lists may be written in any order.
func TestFoundersDeriveTheSameEntry(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 7).Draw(t, "founders")
		list := founderList(n)
		var all []*formation
		for i := range n {
			own := rapid.Permutation(list).Draw(t, "own order")
			all = append(all, startFormation(t, list[i].ID, byte(100+i), own))
		}
		tell := func(from, to int) {
			if from == to {
				return
			}
			if all[from].done() && rapid.Bool().Draw(t, "saved by now") {
				all[from].saved()
			}
			done, err := all[to].heard(list[from].ID, across(t, all[from].answer()))
			if err != nil {
				t.Fatal(err)
			}
			if done != all[to].done() || done != (len(all[to].missing()) == 0) {
				t.Fatalf("done %v, missing %v", done, all[to].missing())
			}
		}
		node := rapid.IntRange(0, n-1)
		for range rapid.IntRange(0, 3*n*n).Draw(t, "random exchanges") {
			tell(node.Draw(t, "from"), node.Draw(t, "to"))
		}
		for from := range n {
			for to := range n {
				tell(from, to)
			}
		}
		for i, f := range all {
			if !f.done() || !slices.Equal(f.entry1().Encoded(), all[0].entry1().Encoded()) {
				t.Fatalf("founder %d: done %v, entry %x, want %x", i, f.done(), f.entry1().Encoded(), all[0].entry1().Encoded())
			}
			if _, self := f.configuration(); self != memberID(i+1) {
				t.Fatalf("founder %d has number %d", i, self)
			}
		}
	})
}

// TestFormationWaitsForEveryFounder, and says whom it misses.
func TestFormationWaitsForEveryFounder(t *testing.T) {
	list := founderList(3)
	a := startFormation(t, "n0", 1, list)
	if got := a.missing(); !slices.Equal(got, []NodeID{"n1", "n2"}) {
		t.Errorf("missing %v", got)
	}
	done, err := a.heard("n2", formAnswer{DirectoryID: dirOf(3), List: list})
	if done || err != nil || !slices.Equal(a.missing(), []NodeID{"n1"}) {
		t.Errorf("done %v, error %v, missing %v", done, err, a.missing())
	}
	if a.answer().formed() || a.entry1().Len() != 0 {
		t.Error("formed without n1")
	}
	// n2 lost its disk meanwhile: its newest directory counts.
	a.heard("n2", formAnswer{DirectoryID: dirOf(4), List: list})
	if done, err := a.heard("n1", formAnswer{DirectoryID: dirOf(2), List: list}); !done || err != nil {
		t.Fatal(done, err)
	}
	conf, _ := a.configuration()
	if conf.byName("n2").dirID != dirOf(4) || conf.clusterUUID == [16]byte{} {
		t.Errorf("configuration %+v", conf)
	}
}

func formed(t *testing.T, list []Member, dirs ...byte) *formation {
	f := startFormation(t, list[0].ID, dirs[0], list)
	for i := 1; i < len(list); i++ {
		if _, err := f.heard(list[i].ID, formAnswer{DirectoryID: dirOf(dirs[i]), List: sortedMembers(list)}); err != nil {
			t.Fatal(err)
		}
	}
	f.saved()
	return f
}

// TestFormationRefusals: every way in which founders can't agree ends in a
// typed error that says what to do, and decides nothing.
func TestFormationRefusals(t *testing.T) {
	list := founderList(3)
	moved := slices.Clone(list)
	moved[2].Addr = "10.9.9.9:7000"
	learner := slices.Clone(list)
	learner[1].Learner = true
	for _, c := range []struct {
		name   string
		answer formAnswer
		reason FormationReason
		text   string
	}{
		{"fewer founders", formAnswer{List: list[:2]}, FormationListsDiffer, "make Bootstrap alike"},
		{"no founders", formAnswer{}, FormationListsDiffer, "lists nobody"},
		{"another address", formAnswer{List: moved}, FormationListsDiffer, "n2=10.9.9.9:7000"},
		{"another kind", formAnswer{List: learner}, FormationListsDiffer, "(learner)"},
		{"formed with another list", formed(t, moved, 9, 1, 2).answer(), FormationListsDiffer, "formed the cluster as"},
		{"formed without me", formed(t, founderList(4)[2:], 8, 9).answer(), FormationNotNamed, "add it with AddVoter"},
		{"formed with my old directory", formed(t, list, 9, 77, 8).answer(), FormationOtherDirectory, "remove n1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := startFormation(t, "n1", 1, list)
			done, err := f.heard("n0", across(t, c.answer))
			var fe *FormationError
			if done || !errors.As(err, &fe) || fe.Reason != c.reason || fe.Peer != "n0" || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("done %v, error %v; want %v, %q", done, err, c.reason, c.text)
			}
			if f.done() || f.answer().formed() {
				t.Error("it formed nevertheless")
			}
		})
	}
	if _, err := startFormation(t, "n1", 1, list).heard("stranger", formAnswer{List: list}); err == nil {
		t.Error("a founder that is not listed was heard")
	}
	for name, bad := range map[string][]Member{"not listed": list[1:], "twice": append(founderList(2), list[0]), "too many": founderList(65)} {
		var fe *FormationError
		if _, err := newFormation("demo", "n0", dirOf(1), bad); !errors.As(err, &fe) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAdoption: an unformed founder takes entry 1 from a formed one that knows
// it with this directory.
func TestAdoption(t *testing.T) {
	list := founderList(3)
	a := formed(t, list, 1, 2, 3)
	b := startFormation(t, "n1", 2, list)
	if done, err := b.heard("n0", across(t, a.answer())); !done || err != nil {
		t.Fatal(done, err)
	}
	if !slices.Equal(b.entry1().Encoded(), a.entry1().Encoded()) {
		t.Error("another entry was adopted")
	}
	if _, self := b.configuration(); self != 2 {
		t.Errorf("n1 has number %d", self)
	}
	// Unformed founders are not an answer any more; a cluster of other
	// directories is a contradiction.
	if done, err := b.heard("n2", formAnswer{DirectoryID: dirOf(9), List: list[:1]}); !done || err != nil {
		t.Error(done, err)
	}
	var fe *FormationError
	if _, err := b.heard("n2", formed(t, list, 1, 2, 4).answer()); !errors.As(err, &fe) || fe.Reason != FormationOtherCluster {
		t.Errorf("two clusters under one name: %v", err)
	}
}

// TestForgedEntry1IsRefused: entry 1 must be what its founders derive, of this
// cluster; anything else is not counted, and not final either.
func TestForgedEntry1IsRefused(t *testing.T) {
	list := founderList(2)
	a := formed(t, list, 1, 2)
	conf, _ := a.configuration()
	entry := func(edit func(c *configuration)) []byte {
		c := configuration{clusterUUID: conf.clusterUUID, members: slices.Clone(conf.members)}
		edit(&c)
		return makeEntry(entryConfiguration, EntryID{Index: 1}, time.Time{}, c.encode()).Encoded()
	}
	other, err := newFormation("prod", "n0", dirOf(1), list[:1])
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{
		"nothing":           {},
		"torn":              a.entry1().Encoded()[:50],
		"a command":         commands(1, 0, []byte("x")).Encoded(),
		"two entries":       append(entry(func(*configuration) {}), makeEntry(entryNoop, EntryID{Index: 2}, time.Time{}, nil).Encoded()...),
		"no configuration":  makeEntry(entryConfiguration, EntryID{Index: 1}, time.Time{}, []byte{9}).Encoded(),
		"another UUID":      entry(func(c *configuration) { c.clusterUUID[0]++ }),
		"another directory": entry(func(c *configuration) { c.members[0].dirID = dirOf(7) }),
		"other numbers":     entry(func(c *configuration) { c.members[1].id = 5 }),
		"a term":            makeEntry(entryConfiguration, EntryID{Index: 1, Term: 1}, time.Time{}, conf.encode()).Encoded(),
		"a time":            makeEntry(entryConfiguration, EntryID{Index: 1}, time.Unix(1, 0), conf.encode()).Encoded(),
		"another cluster":   other.entry1().Encoded(),
	} {
		b := startFormation(t, "n1", 2, list)
		done, err := b.heard("n0", formAnswer{DirectoryID: dirOf(1), Entry1: raw})
		var fe *FormationError
		if done || err == nil || errors.As(err, &fe) || b.done() {
			t.Errorf("%s: done %v, error %v", name, done, err)
		}
	}
	b := startFormation(t, "n1", 2, list)
	if done, err := b.heard("n0", formAnswer{DirectoryID: dirOf(1), Entry1: entry(func(*configuration) {})}); !done || err != nil {
		t.Errorf("the genuine entry: %v, %v", done, err)
	}
}

// TestFormationExchange: one exchange informs both sides; a formed acceptor
// teaches, a wrong greeting fails, a silent peer meets the deadline.
func TestFormationExchange(t *testing.T) {
	list := founderList(2)
	a, b := startFormation(t, "n0", 1, list), startFormation(t, "n1", 2, list)
	conn, peer := net.Pipe()
	accepted := make(chan error, 1)
	go func() {
		accepted <- acceptFormation(peer, func(its formAnswer) (formAnswer, error) {
			_, err := b.heard("n0", its)
			return b.answer(), err
		}, time.Second)
	}()
	its, err := dialFormation(conn, a.answer(), time.Second)
	if err = errors.Join(err, <-accepted); err != nil {
		t.Fatal(err)
	}
	done, err := a.heard("n1", its)
	if !done || err != nil || !b.done() || !slices.Equal(a.entry1().Encoded(), b.entry1().Encoded()) {
		t.Errorf("n0 done %v, %v; n1 done %v", done, err, b.done())
	}

	go func() { readGreeting(peer, maxFormationBytes); peer.Write(encodeGreeting(greetForm, nil)) }()
	if _, err := dialFormation(conn, a.answer(), time.Second); err == nil || !strings.Contains(err.Error(), "a formation question came instead of a formation answer") {
		t.Errorf("a wrong greeting: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		began := time.Now()
		if err := acceptFormation(peer, nil, 3*time.Second); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != 3*time.Second {
			t.Errorf("a silent dialler: %v after %v", err, time.Since(began))
		}
		if _, err := dialFormation(conn, formAnswer{}, 3*time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a silent acceptor: %v", err)
		}
	})
}

func TestFormAnswerRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := formAnswer{DirectoryID: drawDir(t, "directory")}
		if rapid.Bool().Draw(t, "formed") {
			a.Entry1 = rapid.SliceOf(rapid.Byte()).Draw(t, "entry")
		} else {
			for _, id := range rapid.SliceOfNDistinct(rapid.String(), 0, maxFounders, rapid.ID).Draw(t, "ids") {
				a.List = append(a.List, Member{NodeID(id), rapid.String().Draw(t, "addr"), rapid.Bool().Draw(t, "learner")})
			}
			a.List = sortedMembers(a.List)
		}
		if got := across(t, a); !reflect.DeepEqual(got, a) && !(len(a.List) == 0 && len(got.List) == 0 && !a.formed()) {
			t.Fatalf("got %+v, want %+v", got, a)
		}
	})
}

// TestFormAnswerRefusals: lists that no node sends.
func TestFormAnswerRefusals(t *testing.T) {
	list := founderList(3)
	unsorted := []Member{list[1], list[0]}
	twice := []Member{list[0], list[0]}
	good := formAnswer{List: list}
	for name, c := range map[string]struct {
		in   []byte
		want string
	}{
		"unsorted":      {formAnswer{List: unsorted}.encode(nil), "not sorted"},
		"twice":         {formAnswer{List: twice}.encode(nil), "names one twice"},
		"too many":      {formAnswer{List: founderList(maxFounders + 1)}.encode(nil), "a list of 65 founders is over the limit of 64"},
		"huge count":    {append(make([]byte, 17), 0xff, 0xff, 0xff, 0xff, 0x0f), "over the limit of 64"},
		"unknown state": {append([]byte{3}, make([]byte, 16)...), errFlags.Error()},
		"cut short":     {good.encode(nil)[:30], errShort.Error()},
		"too long":      {append(good.encode(nil), 0), errLong.Error()},
	} {
		if a, err := decodeFormAnswer(c.in); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %+v, %v, want %q", name, a, err, c.want)
		}
	}
}

// FuzzForm: no formation answer makes a node panic, and none but a genuine one
// makes it adopt an entry.
func FuzzForm(f *testing.F) {
	list := founderList(2)
	good := formAnswer{DirectoryID: dirOf(1), List: list}
	f.Add(good.encode(nil))
	a, err := newFormation("demo", "n0", dirOf(1), list)
	if err != nil {
		f.Fatal(err)
	}
	a.heard("n1", formAnswer{DirectoryID: dirOf(2), List: list})
	a.saved()
	answer := a.answer()
	f.Add(answer.encode(nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := decodeFormAnswer(in)
		if err != nil {
			return
		}
		me := startFormation(t, "n1", 2, list)
		done, err := me.heard("n0", got)
		if done && (err != nil || me.entry1().Len() != 1 || me.entry1().First() != 1) {
			t.Fatalf("done with %v, %d entries", err, me.entry1().Len())
		}
		if done {
			if conf, self := me.configuration(); self != 2 || len(conf.members) != 2 || conf.byName("n1").dirID != dirOf(2) {
				t.Fatalf("number %d in %+v", self, conf)
			}
		}
	})
}
