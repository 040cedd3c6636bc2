package raft

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Formation is how founders that know nothing but their list of members come
// to hold the same first entry (docs/WIRE.md, "Formation"). This file is the
// logic and the messages; who dials whom is the server's business.

const maxFounders = 64 // Config.Validate has the same limit

// FormationReason says why a node can't found or join its cluster.
type FormationReason byte

const (
	// FormationListsDiffer: founders were given different Bootstrap lists.
	FormationListsDiffer FormationReason = iota + 1
	// FormationOtherDirectory: the cluster exists and knows this node with
	// another data directory.
	FormationOtherDirectory
	// FormationNotNamed: the list, or the existing cluster, does not name this node.
	FormationNotNamed
	// FormationOtherCluster: two clusters were formed under one ClusterID.
	FormationOtherCluster
)

func (r FormationReason) String() string {
	switch r {
	case FormationListsDiffer:
		return "Bootstrap lists differ"
	case FormationOtherDirectory:
		return "other data directory"
	case FormationNotNamed:
		return "not named"
	case FormationOtherCluster:
		return "two clusters"
	}
	return fmt.Sprintf("reason %d", byte(r))
}

// FormationError is why a node did not form. It is final: an operator has to
// change something. Nothing was written.
type FormationError struct {
	Reason FormationReason
	Peer   NodeID // whose answer decided it; empty if the own configuration did
	Text   string // what was found, what was wanted, what to do
}

func (e *FormationError) Error() string {
	if e.Peer == "" {
		return fmt.Sprintf("raft: can't form the cluster: %v: %s", e.Reason, e.Text)
	}
	return fmt.Sprintf("raft: can't form the cluster with %s: %v: %s", e.Peer, e.Reason, e.Text)
}

// formAnswer is where a node stands. In a formed one Entry1 is set, or, if it
// has compacted that, Config; otherwise List is.
type formAnswer struct {
	DirectoryID [16]byte
	List        []Member // sorted by ID
	Entry1      []byte   // encoded
	Config      []byte   // data of the newest committed configuration
}

func (a formAnswer) formed() bool { return a.Entry1 != nil }

// formation is a founder on its way to entry 1. It has no lock and no clock.
type formation struct {
	cluster string
	self    NodeID
	list    []Member      // sorted by ID
	dirs    [][16]byte    // of the founders at the same positions
	heardOf []bool        // whose directory ID is known
	conf    configuration // what entry 1 holds, once it is decided
	entry   Entries
	durable bool
	late    bool // the cluster has gone on without entry 1: this node waits for its leader
}

// newFormation begins forming. dir must be durable already: it is told to the
// others. One founder alone has decided at once.
func newFormation(cluster string, self NodeID, dir [16]byte, list []Member) (*formation, error) {
	f := &formation{
		cluster: cluster, self: self, list: sortedMembers(list),
		dirs: make([][16]byte, len(list)), heardOf: make([]bool, len(list)),
	}
	for i := range f.list {
		if i > 0 && f.list[i].ID == f.list[i-1].ID {
			return nil, &FormationError{Reason: FormationListsDiffer, Text: fmt.Sprintf("Bootstrap lists %s twice; list every founder once", f.list[i].ID)}
		}
	}
	if len(list) > maxFounders {
		return nil, &FormationError{Reason: FormationListsDiffer, Text: fmt.Sprintf("Bootstrap lists %d founders, the limit is %d", len(list), maxFounders)}
	}
	me := f.position(self)
	if me < 0 {
		return nil, &FormationError{Reason: FormationNotNamed, Text: fmt.Sprintf(
			"Bootstrap lists %s and not this node, %s; list it on every founder, or leave Bootstrap empty here and add the node with AddVoter", describeMembers(f.list), self)}
	}
	f.dirs[me], f.heardOf[me] = dir, true
	f.decide()
	return f, nil
}

func sortedMembers(list []Member) []Member {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b Member) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return list
}

func (f *formation) position(id NodeID) int {
	return slices.IndexFunc(f.list, func(m Member) bool { return m.ID == id })
}

// done tells whether entry 1 is decided.
func (f *formation) done() bool { return f.entry.Len() == 1 }

// entry1 returns the decided first entry: what every founder has.
func (f *formation) entry1() Entries { return f.entry }

// configuration returns what entry 1 holds, and this node's number in it.
func (f *formation) configuration() (configuration, memberID) {
	return f.conf, f.conf.byName(f.self).id
}

// saved notes that entry 1 is durable here. Before that nobody is told of it.
func (f *formation) saved() { f.durable = true }

// missing returns the founders that have not been heard, in order of their IDs.
func (f *formation) missing() []NodeID {
	if f.done() {
		return nil
	}
	var ids []NodeID
	for i, m := range f.list {
		if !f.heardOf[i] {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// answer returns what this node tells the others.
func (f *formation) answer() formAnswer {
	a := formAnswer{DirectoryID: f.dirs[f.position(f.self)]}
	if f.durable {
		a.Entry1 = f.entry.Encoded()
	} else {
		a.List = f.list
	}
	return a
}

// heard takes what another node said and tells whether entry 1 is decided. A
// *FormationError is final. Another error means that the answer made no sense:
// it was not counted, and its connection should be closed.
func (f *formation) heard(from NodeID, a formAnswer) (done bool, err error) {
	if a.Config != nil {
		return false, f.heardCompacted(from, a)
	}
	if a.formed() {
		err = f.heardFormed(from, a)
		return f.done() && err == nil, err
	}
	if f.done() {
		return true, nil // it will learn from this node's answer what was decided
	}
	i := f.position(from)
	if i < 0 || !slices.Equal(a.List, f.list) {
		return false, f.listsDiffer(from, "lists "+describeMembers(a.List))
	}
	if from == f.self {
		return false, errors.New("raft: a node answered under this node's own ID")
	}
	// A founder may come back with a new directory before the cluster exists;
	// its newest one counts.
	f.dirs[i], f.heardOf[i] = a.DirectoryID, true
	f.decide()
	return f.done(), nil
}

func (f *formation) heardFormed(from NodeID, a formAnswer) error {
	conf, entry, err := parseEntry1(f.cluster, a.Entry1)
	if err != nil {
		return err
	}
	if f.done() {
		if !slices.Equal(entry.Encoded(), f.entry.Encoded()) {
			return &FormationError{Reason: FormationOtherCluster, Peer: from, Text: fmt.Sprintf(
				"it formed cluster %x, this node another one, both called %q; a founder's data directory was replaced while they formed: wipe the directories of all founders and form again", conf.clusterUUID, f.cluster)}
		}
		return nil
	}
	if conf.byName(f.self) != nil && !slices.Equal(conf.list(), f.list) {
		return f.listsDiffer(from, "formed the cluster as "+describeMembers(conf.list()))
	}
	if err := f.namedIn(&conf, from); err != nil {
		return err
	}
	f.conf, f.entry = conf, entry
	return nil
}

// heardCompacted takes the answer of a node whose log begins after entry 1.
// This founder was cut short before it had entry 1, and has voted for nobody:
// the leader will send it a snapshot, as it would to any member that is behind.
func (f *formation) heardCompacted(from NodeID, a formAnswer) error {
	conf, err := decodeConfiguration(a.Config)
	if err == nil {
		err = f.namedIn(&conf, from)
	}
	f.late = f.late || err == nil && !f.done()
	return err
}

// namedIn returns why a cluster with this configuration is not this node's.
func (f *formation) namedIn(conf *configuration, from NodeID) error {
	me := conf.byName(f.self)
	if me == nil {
		return &FormationError{Reason: FormationNotNamed, Peer: from, Text: fmt.Sprintf(
			"the cluster exists with members %s; leave Bootstrap empty on %s and add it with AddVoter", describeMembers(conf.list()), f.self)}
	}
	if mine := f.dirs[f.position(f.self)]; me.dirID != mine {
		return &FormationError{Reason: FormationOtherDirectory, Peer: from, Text: fmt.Sprintf(
			"the cluster knows %s with data directory %x and this one is %x, so its data was lost or the directory is another one; restore its own directory, or add the node under a new ID with an empty Bootstrap and remove %s", f.self, me.dirID, mine, f.self)}
	}
	return nil
}

func (f *formation) listsDiffer(from NodeID, its string) error {
	return &FormationError{Reason: FormationListsDiffer, Peer: from, Text: fmt.Sprintf(
		"%s %s, this node lists %s; make Bootstrap alike on every founder, or, if the cluster exists, leave it empty here and add the node with AddVoter", from, its, describeMembers(f.list))}
}

// decide derives entry 1 once every founder has been heard.
func (f *formation) decide() {
	if slices.Contains(f.heardOf, false) {
		return
	}
	conf := configuration{}
	for i, m := range f.list {
		conf.members = append(conf.members, member{id: memberID(i + 1), name: m.ID, addr: m.Addr, learner: m.Learner, dirID: f.dirs[i]})
	}
	conf.clusterUUID = clusterUUID(f.cluster, conf.members)
	f.conf = conf
	f.entry = makeEntry(entryConfiguration, EntryID{Index: 1}, time.Time{}, conf.encode())
}

// clusterUUID names the cluster that these founders form with these directories.
func clusterUUID(cluster string, founders []member) (id [16]byte) {
	b := appendString(nil, cluster)
	for _, m := range founders {
		b = append(appendString(b, string(m.name)), m.dirID[:]...)
	}
	sum := sha256.Sum256(b)
	copy(id[:], sum[:])
	return id
}

// parseEntry1 reads a first entry and checks that it is one of this cluster:
// it must be, byte for byte, what its founders would have derived.
func parseEntry1(cluster string, b []byte) (configuration, Entries, error) {
	e, err := ParseEntries(1, b)
	if err != nil {
		return configuration{}, e, fmt.Errorf("raft: entry 1 of a formed node: %w", err)
	}
	if e.Len() != 1 || e.kind(0) != entryConfiguration {
		return configuration{}, e, errors.New("raft: a formed node answered with something else than entry 1")
	}
	conf, err := decodeConfiguration(e.data(0))
	if err != nil {
		return conf, e, err
	}
	list := conf.list()
	check := formation{cluster: cluster, list: sortedMembers(list)}
	for _, m := range conf.members {
		check.dirs, check.heardOf = append(check.dirs, m.dirID), append(check.heardOf, true)
	}
	check.decide()
	if !slices.Equal(check.entry.Encoded(), b) {
		return conf, e, fmt.Errorf("raft: entry 1 of a formed node is not what founders %s of cluster %q derive", describeMembers(list), cluster)
	}
	return conf, e, nil
}

func (a formAnswer) encode(b []byte) []byte {
	b = append(append(b, flag(a.formed(), 1)|flag(a.Config != nil, 2)), a.DirectoryID[:]...)
	if a.Config != nil {
		return append(b, a.Config...)
	}
	if a.formed() {
		return append(b, a.Entry1...)
	}
	b = binary.AppendUvarint(b, uint64(len(a.List)))
	for _, m := range a.List {
		b = append(b, flag(m.Learner, 1))
		b = appendString(appendString(b, string(m.ID)), m.Addr)
	}
	return b
}

func decodeFormAnswer(b []byte) (a formAnswer, err error) {
	r := reader{b: b}
	state := r.byte()
	copy(a.DirectoryID[:], r.bytes(16))
	switch {
	case state == 1:
		a.Entry1 = r.bytes(uint64(len(r.b)))
		return a, r.finish()
	case state == 2:
		a.Config = r.bytes(uint64(len(r.b)))
		return a, r.finish()
	case state > 2:
		return a, errFlags
	}
	n := r.uvarint()
	if n > maxFounders {
		return a, fmt.Errorf("raft: a list of %d founders is over the limit of %d", n, maxFounders)
	}
	for i := uint64(0); i < n && r.err == nil; i++ {
		m := Member{Learner: r.flags(1) != 0}
		m.ID, m.Addr = NodeID(r.string()), r.string()
		if i > 0 && m.ID <= a.List[i-1].ID && r.err == nil {
			r.err = errors.New("raft: a list of founders is not sorted, or names one twice")
		}
		a.List = append(a.List, m)
	}
	return a, r.finish()
}

// dialFormation tells the other side where this node stands and returns where
// the other does. The handshake on the formation channel must be done.
func dialFormation(conn net.Conn, mine formAnswer, timeout time.Duration) (formAnswer, error) {
	conn.SetDeadline(time.Now().Add(timeout)) // an error here comes back from the write
	if err := sendFormAnswer(conn, greetForm, mine); err != nil {
		return formAnswer{}, formFailure(conn, err)
	}
	a, err := readFormAnswer(conn, greetFormBack)
	if err != nil {
		return a, formFailure(conn, err)
	}
	return a, nil
}

// acceptFormation is the other end of dialFormation. answer gets what the
// dialler said and returns what this node says; it may refuse by an error,
// after which nothing is said.
func acceptFormation(conn net.Conn, answer func(formAnswer) (formAnswer, error), timeout time.Duration) error {
	conn.SetDeadline(time.Now().Add(timeout)) // an error here comes back from the read
	its, err := readFormAnswer(conn, greetForm)
	if err != nil {
		return formFailure(conn, err)
	}
	mine, err := answer(its)
	if err != nil {
		return err
	}
	if err := sendFormAnswer(conn, greetFormBack, mine); err != nil {
		return formFailure(conn, err)
	}
	return nil
}

func sendFormAnswer(conn net.Conn, kind greetingKind, a formAnswer) error {
	b := encodeGreeting(kind, a.encode(nil))
	if len(b) > maxFormationBytes {
		return fmt.Errorf("a list of %d bytes is over the limit of %d; shorten the IDs and addresses", len(b), maxFormationBytes)
	}
	_, err := conn.Write(b)
	return err
}

func readFormAnswer(conn net.Conn, want greetingKind) (formAnswer, error) {
	kind, body, err := readGreeting(conn, maxFormationBytes)
	if err != nil {
		return formAnswer{}, err
	}
	if kind != want {
		return formAnswer{}, fmt.Errorf("a %v came instead of a %v", kind, want)
	}
	return decodeFormAnswer(body)
}

func formFailure(conn net.Conn, err error) error {
	return fmt.Errorf("raft: formation with %v: %w", conn.RemoteAddr(), err)
}
