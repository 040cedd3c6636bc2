package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"example.com/raft"
)

//go:embed page.html
var pageHTML []byte

// The page is one file and loads nothing; what it shows is data, never markup.
const pagePolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

const (
	shownKeys    = 50
	shownRecords = 80
	shownWindow  = 60 * time.Second
	silent       = 2 * time.Second // a follower that its leader has not heard for so long is not shown as one
)

// page serves the status page, what it shows, and what its buttons do.
type page struct {
	cluster *Cluster
	self    *Node // whose port it is; nil on the port of the page alone
	control bool  // the buttons work
}

// newPage returns the handler of one port: the page, and the API of self.
func newPage(c *Cluster, self *Node, control bool) http.Handler {
	p := &page{c, self, control}
	mux := http.NewServeMux()
	if self != nil {
		self.api().register(mux)
	}
	mux.HandleFunc("/nodes/{id}/kv/", p.through)
	mux.HandleFunc("GET /{$}", p.html)
	mux.HandleFunc("GET /status", p.status)
	if control {
		mux.HandleFunc("POST /nodes", p.add)
		mux.HandleFunc("POST /nodes/{id}/{action}", p.act)
	}
	return mux
}

// through is a request through the node of the user's choice: the page may ask
// its own origin only.
func (p *page) through(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	n := p.cluster.node(id)
	if n == nil {
		fail(w, http.StatusNotFound, "there is no node %q", id)
		return
	}
	mux := http.NewServeMux()
	n.api().register(mux)
	http.StripPrefix("/nodes/"+id, mux).ServeHTTP(w, r)
}

// api returns the node's API, which follows its restarts.
func (n *Node) api() *api {
	return &api{propose: n.propose, open: n.openSession, end: n.closeSession, store: n.fresh, timeout: n.Timeout}
}

func (p *page) html(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", pagePolicy)
	w.Header().Set("Cache-Control", "no-cache")
	w.Write(pageHTML)
}

// pageState is what /status answers.
type pageState struct {
	Now     int64                  `json:"now"` // milliseconds since 1970
	Window  int64                  `json:"window"`
	Self    raft.NodeID            `json:"self"` // whose port this is, "" if nobody's
	Control bool                   `json:"control"`
	Nodes   []nodeState            `json:"nodes"`
	Keys    []keyInfo              `json:"keys"`
	Total   int                    `json:"total"`  // keys, of which Keys are the newest
	Source  raft.NodeID            `json:"source"` // the node that holds Keys
	Records []record               `json:"records"`
	Spans   map[raft.NodeID][]span `json:"spans"`
}

// nodeState is one node as this process knows it.
type nodeState struct {
	ID       raft.NodeID   `json:"id"`
	Here     bool          `json:"here"` // it runs in this process; otherwise only Role, Leader, Last and Raft are set
	Running  bool          `json:"running"`
	Member   string        `json:"member"` // voter, learner, removed, none; "" if no member is known
	Cut      bool          `json:"cut"`
	Role     string        `json:"role"`
	Term     raft.Term     `json:"term"`
	Leader   raft.NodeID   `json:"leader"`
	First    raft.Index    `json:"first"`
	Last     raft.Index    `json:"last"`
	Commit   raft.Index    `json:"commit"`
	Applied  raft.Index    `json:"applied"`
	Snapshot raft.Index    `json:"snapshot"`
	Sessions int           `json:"sessions"`
	Lease    bool          `json:"lease"`
	Sent     int64         `json:"sent"` // bytes of the snapshot that its leader sends it
	Size     int64         `json:"size"` // of that snapshot, 0 if it is sent none
	HTTP     string        `json:"http"`
	Raft     string        `json:"raft"`
	Missing  []raft.NodeID `json:"missing"`
	Error    string        `json:"error"`
}

func (p *page) status(w http.ResponseWriter, r *http.Request) {
	state := pageState{Now: time.Now().UnixMilli(), Window: shownWindow.Milliseconds(), Control: p.control}
	if p.self != nil {
		state.Self = p.self.ID
	}
	state.Records, state.Spans = p.cluster.Feed.recent(shownRecords, shownWindow)
	var source *Store
	var newest raft.Index
	var judge raft.Status // of the node that says who is a member
	for _, n := range p.cluster.Nodes() {
		server, store, running := n.current()
		var st raft.Status
		if server != nil {
			st = server.Status()
		}
		state.Nodes = append(state.Nodes, n.state(st, running))
		// The keys shown are those of the running node that applied most.
		if running && (source == nil || st.Applied > newest) {
			source, newest, state.Source = store, st.Applied, n.ID
		}
		if running && knowsBetter(st, judge) {
			judge = st
		}
		if !p.control {
			state.Nodes = append(state.Nodes, others(st)...)
		}
	}
	slices.SortFunc(state.Nodes, func(a, b nodeState) int { return cmp.Compare(a.ID, b.ID) })
	for i := range state.Nodes {
		state.Nodes[i].judge(judge)
	}
	if source != nil {
		state.Keys, state.Total = source.newest(shownKeys)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(state)
}

// knowsBetter tells whether a is to be believed rather than b about who is a
// member: the leader of the highest term is, else who has committed most.
func knowsBetter(a, b raft.Status) bool {
	leadsA, leadsB := a.Role == raft.Leader, b.Role == raft.Leader
	switch {
	case len(a.Members) == 0 || len(b.Members) == 0:
		return len(a.Members) > 0
	case leadsA != leadsB:
		return leadsA
	case leadsA:
		return a.Term > b.Term
	}
	return a.Commit > b.Commit
}

func (n *Node) state(st raft.Status, running bool) nodeState {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := nodeState{
		ID: n.ID, Here: true, Running: running && st.Role != raft.Dead, Cut: n.gate.isCut(),
		Role: st.Role.String(), Term: st.Term, Leader: st.Leader,
		First: st.First, Last: st.Last, Commit: st.Commit, Applied: st.Applied, Snapshot: st.Snapshot, Sessions: st.Sessions, Lease: st.Lease,
		HTTP: n.HTTP, Raft: n.Listen, Missing: st.Missing,
	}
	if n.removed {
		s.Member = "removed"
	} else if st.Err != nil && !errors.Is(st.Err, raft.ErrStopped) {
		s.Error = st.Err.Error()
	}
	return s
}

// judge sets what another node, or this one, says of the node as a member.
func (s *nodeState) judge(by raft.Status) {
	if s.Member == "removed" || len(by.Members) == 0 {
		return
	}
	s.Member = "none"
	for _, m := range by.Members {
		if m.ID == s.ID {
			s.Member = "voter"
			if m.Learner {
				s.Member = "learner"
			}
		}
	}
	for _, f := range by.Followers {
		if f.ID == s.ID {
			s.Sent, s.Size = f.SnapshotSent, f.SnapshotSize
		}
	}
}

// others is what a node of a cluster of processes knows of the other nodes: who
// leads, and, if it leads itself, how far they are.
func others(st raft.Status) []nodeState {
	var nodes []nodeState
	for _, m := range st.Members {
		if m.ID == st.ID {
			continue
		}
		n := nodeState{ID: m.ID, Raft: m.Addr}
		if m.ID == st.Leader {
			n.Role, n.Term = raft.Leader.String(), st.Term
		}
		for _, f := range st.Followers {
			if f.ID == m.ID && st.Role == raft.Leader {
				n.Last = f.Match
				if time.Since(f.LastContact) < silent {
					n.Role = raft.Follower.String()
				}
			}
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// add runs one more node: a voter, or with ?as=learner a learner.
func (p *page) add(w http.ResponseWriter, r *http.Request) {
	as := cmp.Or(r.FormValue("as"), "voter")
	if as != "voter" && as != "learner" {
		fail(w, http.StatusBadRequest, "a node can't be added as %q: use as=voter or as=learner", as)
		return
	}
	n, err := p.cluster.AddNode(as == "learner")
	if err != nil {
		refuseAction(w, err)
		return
	}
	w.WriteHeader(http.StatusCreated)
	fmt.Fprintf(w, "node %s is a %s, clients at http://%s\n", n.ID, as, n.HTTP)
}

// act is a press of one of the page's buttons.
func (p *page) act(w http.ResponseWriter, r *http.Request) {
	node := p.cluster.node(r.PathValue("id"))
	if node == nil {
		fail(w, http.StatusNotFound, "there is no node %q", r.PathValue("id"))
		return
	}
	var err error
	said := ""
	switch action := r.PathValue("action"); action {
	case "kill":
		err = node.Kill()
	case "restart":
		err = node.Start(r.Context())
	case "partition":
		node.SetPartitioned(true)
	case "heal":
		node.SetPartitioned(false)
	case "voter", "learner":
		err = p.cluster.Add(node, action == "learner")
		said = fmt.Sprintf("node %s is a %s", node.ID, action)
	case "remove":
		err = p.cluster.Remove(node)
		said = fmt.Sprintf("node %s is removed and stopped; its data is in %s", node.ID, node.asideDir())
	case "lead":
		err = p.cluster.Lead(node)
		said = fmt.Sprintf("node %s was handed the leadership", node.ID)
	case "snapshot":
		var last raft.Index
		last, err = p.cluster.TakeSnapshot(node)
		said = fmt.Sprintf("node %s has a snapshot up to entry %d", node.ID, last)
	default:
		fail(w, http.StatusNotFound, "a node can't %q: use kill, restart, partition, heal, snapshot, lead, voter, learner or remove", action)
		return
	}
	switch {
	case err != nil:
		refuseAction(w, err)
	case said == "":
		w.WriteHeader(http.StatusNoContent)
	default:
		fmt.Fprintln(w, said)
	}
}

// refuseAction translates the error of a button.
func refuseAction(w http.ResponseWriter, err error) {
	var membership *raft.MembershipError
	var transfer *raft.TransferError
	again := errors.Is(err, errNoLeader) || errors.Is(err, raft.ErrStopped) || errors.Is(err, raft.ErrSuperseded)
	if errors.As(err, &membership) {
		switch membership.Reason {
		case raft.MembershipNotLeader, raft.MembershipTooEarly, raft.MembershipPending:
			again = true
		}
	} else if errors.As(err, &transfer) {
		again = transfer.Reason == raft.TransferNotLeader
	}
	switch {
	case errors.Is(err, raft.ErrOutcomeUnknown), errors.Is(err, context.DeadlineExceeded):
		fail(w, http.StatusGatewayTimeout, "%v\nIt may still be done. Is a majority connected, and the node itself? Look at the page before trying again.", err)
	case again: // the leader is changing, or is about to finish something
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, "%v\nNothing was changed: try again in a second.", err)
	case transfer != nil && transfer.Reason == raft.TransferNotVoter:
		fail(w, http.StatusConflict, "%v\nOnly a voter can lead: make it one first.", err)
	case membership != nil, transfer != nil:
		fail(w, http.StatusConflict, "%v", err)
	case errors.Is(err, errRunning), errors.Is(err, errStopped), errors.Is(err, errRemoved), errors.Is(err, errBusy), errors.Is(err, errFull):
		fail(w, http.StatusConflict, "%v", err)
	default:
		fail(w, http.StatusInternalServerError, "%v", err)
	}
}
