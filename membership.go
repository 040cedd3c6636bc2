package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Member is one server of a cluster.
type Member struct {
	ID      NodeID // unique within the cluster, never empty
	Addr    string // host:port where the others reach it
	Learner bool   // receives the log and does not vote
}

// member is a Member with the number of its membership, and what it is to
// become.
type member struct {
	id      memberID
	name    NodeID
	addr    string
	learner bool
	next    nextState
	dirID   [16]byte // of its data directory: a wiped or copied disk is refused; zero: not known
}

// nextState is what a member becomes in the configuration to be entered. It is
// part of the entry, so that any later leader can finish a change.
type nextState byte

const (
	staysAsIs      nextState = 0
	becomesVoter   nextState = 1
	becomesLearner nextState = 2
	leaves         nextState = 3
)

// configuration is who belongs to the cluster, as of one entry of the log. A
// server uses the newest one in its log, committed or not (§6).
type configuration struct {
	clusterUUID [16]byte
	joint       bool     // decisions need a majority of the voters as they are and of those as they will be (§6)
	members     []member // by ascending id
}

// votes tells whether the member is a voter, now or in the configuration to be entered.
func (m *member) votes(entered bool) bool {
	if entered && m.next != staysAsIs {
		return m.next == becomesVoter
	}
	return !m.learner
}

func (conf *configuration) find(id memberID) *member {
	for i := range conf.members {
		if conf.members[i].id == id {
			return &conf.members[i]
		}
	}
	return nil
}

func (conf *configuration) byName(name NodeID) *member {
	for i := range conf.members {
		if conf.members[i].name == name {
			return &conf.members[i]
		}
	}
	return nil
}

// numberOf returns which member a node of this name and directory is, 0 if none.
// A member of its name with another directory is a former one: a node that was
// wiped and added again finds it in the old configurations that it receives,
// where it voted.
func (conf *configuration) numberOf(name NodeID, directory [16]byte) memberID {
	m := conf.byName(name)
	if m == nil || m.dirID != ([16]byte{}) && m.dirID != directory {
		return 0
	}
	return m.id
}

func (conf *configuration) has(id memberID) bool { return conf.find(id) != nil }

// voter tells whether a member's vote counts in some majority. One that is to
// become a voter is none before the configuration is joint.
func (conf *configuration) voter(id memberID) bool {
	m := conf.find(id)
	return m != nil && (m.votes(false) || conf.joint && m.votes(true))
}

func (id memberID) label(c *core) NodeID {
	if m := c.configuration.find(id); m != nil {
		return m.name
	}
	if id == 0 {
		return ""
	}
	return NodeID(fmt.Sprintf("#%d", id))
}

// encode returns the data of a configuration entry (docs/FORMAT.md).
func (conf *configuration) encode() []byte {
	b := append([]byte{1 | flag(conf.joint, 0x80)}, conf.clusterUUID[:]...)
	b = binary.AppendUvarint(b, uint64(len(conf.members)))
	for _, m := range conf.members {
		b = append(binary.AppendUvarint(b, uint64(m.id)), flag(m.learner, 1)|byte(m.next)<<1)
		b = append(b, m.dirID[:]...)
		b = appendString(appendString(b, string(m.name)), m.addr)
	}
	return b
}

var errConfiguration = errors.New("raft: configuration entry is malformed")

func decodeConfiguration(b []byte) (configuration, error) {
	var conf configuration
	if len(b) < 17 || b[0]&0x7f != 1 {
		return conf, errConfiguration
	}
	conf.joint = b[0]&0x80 != 0
	r := reader{b: b[1:]}
	copy(conf.clusterUUID[:], r.bytes(16))
	n := r.uvarint()
	for i := uint64(0); i < n && r.err == nil; i++ {
		m := member{id: memberID(r.uvarint())}
		f := r.flags(7)
		m.learner, m.next = f&1 != 0, nextState(f>>1)
		copy(m.dirID[:], r.bytes(16))
		m.name, m.addr = NodeID(r.string()), r.string()
		conf.members = append(conf.members, m)
	}
	if r.err != nil || len(r.b) != 0 {
		return configuration{}, errConfiguration
	}
	if !slices.IsSortedFunc(conf.members, func(a, b member) int { return int(int64(a.id) - int64(b.id)) }) {
		return configuration{}, errConfiguration
	}
	return conf, nil
}

func appendUint64s(b []byte, vs ...uint64) []byte {
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// reader takes fields off the front of b. After the first error, which is kept, every
// field is zero.
type reader struct {
	b   []byte
	err error
}

var errShort = errors.New("raft: message is shorter than its fields")

func (r *reader) bytes(n uint64) []byte {
	if r.err == nil && n > uint64(len(r.b)) {
		r.err = errShort
	}
	if r.err != nil {
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if r.err == nil && n <= 0 {
		r.err = errShort
	}
	if r.err != nil {
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) uint64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (r *reader) string() string { return string(r.bytes(r.uvarint())) }

func (r *reader) byte() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

var errFlags = errors.New("raft: message has flags that this version does not know")

// flags reads a byte of which only the known bits may be set.
func (r *reader) flags(known byte) byte {
	f := r.byte()
	if f&^known != 0 && r.err == nil {
		r.err = errFlags
	}
	return f
}

func flag(set bool, bit byte) byte {
	if set {
		return bit
	}
	return 0
}

// list returns the members as an operator lists them.
func (conf *configuration) list() []Member {
	out := make([]Member, len(conf.members))
	for i, m := range conf.members {
		out[i] = Member{ID: m.name, Addr: m.addr, Learner: m.learner}
	}
	return out
}

func describeMembers(list []Member) string {
	if len(list) == 0 {
		return "nobody"
	}
	var s []string
	for _, m := range list {
		one := fmt.Sprintf("%s=%s", m.ID, m.Addr)
		if m.Learner {
			one += " (learner)"
		}
		s = append(s, one)
	}
	return strings.Join(s, ", ")
}
